//! The templates of a backend, by what they are made of. Each is made once, however many pools ask
//! for it at a time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use crate::profile::{Balloon, Profile};

/// Everything of a profile that makes its template what it is. Its name does not: pools that share a
/// backend may mean different guests by one name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ingredients {
    pub(super) image: String,
    pub(super) memory_mib: u32,
    pub(super) vcpus: u8,
    pub(super) packages: BTreeSet<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) warm_up: Vec<String>,
    pub(super) balloon: Balloon,
}

impl From<&Profile> for Ingredients {
    fn from(profile: &Profile) -> Self {
        // Field by field: whoever adds one has to say here whether it counts.
        let Profile {
            name: _,
            image,
            memory_mib,
            vcpus,
            packages,
            env,
            warm_up,
            balloon,
            park: _,
            warm_pool_size: _,
            autoscale: _,
            unknown: _,
        } = profile;
        Self {
            image: image.clone(),
            memory_mib: *memory_mib,
            vcpus: *vcpus,
            packages: packages.clone(),
            env: env.clone(),
            warm_up: warm_up.clone(),
            balloon: *balloon,
        }
    }
}

/// What was made, by its ingredients.
pub(super) struct Templates<T> {
    made: Mutex<HashMap<Ingredients, Arc<OnceCell<T>>>>,
}

impl<T> Default for Templates<T> {
    fn default() -> Self {
        Self {
            made: Mutex::default(),
        }
    }
}

impl<T: Clone> Templates<T> {
    /// What is made of `ingredients`; made by `make` if nobody has yet. Who asks meanwhile waits for
    /// it; if it fails or is cancelled, the next one tries.
    pub(super) async fn get_or_make<E, F>(
        &self,
        ingredients: Ingredients,
        make: impl FnOnce() -> F,
    ) -> Result<T, E>
    where
        F: Future<Output = Result<T, E>>,
    {
        let cell = {
            let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(made.entry(ingredients).or_default())
        };
        cell.get_or_try_init(make).await.cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::profile::Parking;

    fn profile() -> Profile {
        Profile::new("one", "image")
    }

    #[test]
    fn all_that_makes_a_guest_what_it_is_counts_and_nothing_else() {
        let of = |profile: Profile| Ingredients::from(&profile);
        let base = of(profile());
        let others = [
            of(Profile::new("one", "other")),
            of(profile().memory_mib(64)),
            of(profile().vcpus(2)),
            of(profile().package("numpy")),
            of(profile().env("A", "1")),
            of(profile().env("A", "2")),
            of(profile().warm_up(["true"])),
            of(profile().balloon(Balloon::Off)),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(*other, base);
            assert!(others[index + 1..].iter().all(|next| next != other));
        }
        let same = Profile::new("another name", "image");
        let same = same.park(Parking::Paused).warm_pool_size(9);
        assert_eq!(of(same), base);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_at_the_same_time_gets_the_same_and_a_failure_or_a_cancel_is_made_good() {
        let templates = Templates::<u32>::default();
        let made = AtomicU32::new(0);
        let ask = |profile: Profile, outcome: Result<(), ()>| {
            let (templates, made) = (&templates, &made);
            async move {
                let make = || async {
                    sleep(Duration::from_secs(10)).await;
                    let number = made.fetch_add(1, Ordering::Relaxed);
                    outcome.map(|()| number)
                };
                let ingredients = Ingredients::from(&profile);
                templates.get_or_make(ingredients, make).await
            }
        };
        let three = || ask(profile(), Ok(()));
        assert_eq!(
            tokio::join!(three(), three(), three()),
            (Ok(0), Ok(0), Ok(0))
        );
        assert_eq!(three().await, Ok(0));
        // Another guest under the same name is another guest.
        let other = || profile().env("A", "1");
        let cancelled = timeout(Duration::from_secs(1), ask(other(), Ok(()))).await;
        assert!(cancelled.is_err());
        assert_eq!(
            tokio::join!(ask(other(), Err(())), ask(other(), Ok(()))),
            (Err(()), Ok(2))
        );
        assert_eq!(made.load(Ordering::Relaxed), 3);
    }
}
