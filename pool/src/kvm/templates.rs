//! The templates of a backend, by their inputs. Each is made once, however many pools ask for it at
//! a time. Where one cannot be made, VMs boot from cold, and it is tried again from time to time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::Instant;

use crate::ledger::breaker::doubled;
use crate::profile::{Balloon, Language, Profile};

/// The fields of a profile that determine its template. The name is not among them: pools that
/// share a backend may use one name for different guests.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ingredients {
    pub(super) image: String,
    pub(super) memory_mib: u32,
    pub(super) vcpus: u8,
    pub(super) packages: BTreeSet<String>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) warm_up: Vec<String>,
    pub(super) session: Option<Language>,
    pub(super) prelude: String,
    pub(super) balloon: Balloon,
}

impl From<&Profile> for Ingredients {
    fn from(profile: &Profile) -> Self {
        // Field by field, so that each new field has to be considered here.
        let Profile {
            name: _,
            image,
            memory_mib,
            vcpus,
            packages,
            env,
            warm_up,
            session,
            prelude,
            balloon,
            park: _,
            warm_pool_size: _,
            autoscale: _,
        } = profile;
        Self {
            image: image.clone(),
            memory_mib: *memory_mib,
            vcpus: *vcpus,
            packages: packages.clone(),
            env: env.clone(),
            warm_up: warm_up.clone(),
            session: *session,
            prelude: prelude.clone(),
            balloon: *balloon,
        }
    }
}

/// Why there is no template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmade<E> {
    /// No guest could be booted and warmed up for it; a boot from cold would fail as well.
    NoGuest(E),
    /// The guest was fine, but could not be made a template; a boot from cold works.
    Refused(E),
}

/// Delays before a refused template is tried again: the first and the longest; doubled each time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Retry {
    pub(super) first: Duration,
    pub(super) longest: Duration,
}

/// The templates that were made or refused, by their inputs.
pub(super) struct Templates<T, E> {
    retry: Retry,
    places: Mutex<HashMap<Ingredients, Arc<Place<T, E>>>>,
}

struct Place<T, E> {
    made: OnceCell<T>,
    setback: Mutex<Option<Setback<E>>>,
}

struct Setback<E> {
    why: Arc<E>,
    times: u32,
    again: Instant,
}

/// Which caller may make a template.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Never refused: callers wait for the one that makes it.
    InLine,
    /// Refused long enough ago: one caller tries again, and the others do not wait.
    Again,
    /// Refused, and not due to be tried again.
    Nobodys,
}

impl<T, E> Place<T, E> {
    fn setback(&self) -> MutexGuard<'_, Option<Setback<E>>> {
        self.setback.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, retry: Retry) -> Turn {
        let now = Instant::now();
        match &mut *self.setback() {
            None => Turn::InLine,
            Some(setback) if now < setback.again => Turn::Nobodys,
            Some(setback) => {
                // Set before the try, so that it also holds if the try is cancelled.
                setback.again = now + retry.after(setback.times);
                Turn::Again
            }
        }
    }

    fn set_back(&self, retry: Retry, why: E) {
        let mut setback = self.setback();
        let times = setback.as_ref().map_or(0, |last| last.times);
        *setback = Some(Setback {
            why: Arc::new(why),
            times: times.saturating_add(1),
            again: Instant::now() + retry.after(times),
        });
    }
}

impl Retry {
    fn after(self, times: u32) -> Duration {
        doubled(self.first, times, self.longest)
    }
}

impl<T: Clone, E> Templates<T, E> {
    pub(super) fn new(retry: Retry) -> Self {
        let places = Mutex::default();
        Self { retry, places }
    }

    /// Returns the template for `ingredients`, made by `make` if there is none yet. Callers wait
    /// while another one makes it; if that fails or is cancelled, the next one tries. `None` if it
    /// was refused and will be tried again later.
    ///
    /// # Errors
    /// If there was no guest to make it of.
    pub(super) async fn get_or_make<F>(
        &self,
        ingredients: Ingredients,
        make: impl FnOnce() -> F,
    ) -> Result<Option<T>, E>
    where
        F: Future<Output = Result<T, Unmade<E>>>,
    {
        let place = self.place(ingredients);
        let turn = match place.made.get() {
            Some(made) => return Ok(Some(made.clone())),
            None => place.turn(self.retry),
        };
        if turn == Turn::Nobodys {
            return Ok(None);
        }
        let make = || async {
            if turn == Turn::InLine && place.setback().is_some() {
                // The try that this caller waited for was refused.
                return Err(None);
            }
            match make().await {
                Ok(made) => {
                    *place.setback() = None;
                    Ok(made)
                }
                Err(Unmade::NoGuest(why)) => Err(Some(why)),
                Err(Unmade::Refused(why)) => {
                    place.set_back(self.retry, why);
                    Err(None)
                }
            }
        };
        match place.made.get_or_try_init(make).await {
            Ok(made) => Ok(Some(made.clone())),
            Err(None) => Ok(None),
            Err(Some(why)) => Err(why),
        }
    }

    /// Returns the reason why there is no template for `ingredients`, if it was refused last.
    pub(super) fn setback(&self, ingredients: Ingredients) -> Option<Arc<E>> {
        let place = self.place(ingredients);
        let setback = place.setback();
        setback.as_ref().map(|setback| Arc::clone(&setback.why))
    }

    fn place(&self, ingredients: Ingredients) -> Arc<Place<T, E>> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry(ingredients).or_insert_with(|| {
            let (made, setback) = (OnceCell::new(), Mutex::new(None));
            Arc::new(Place { made, setback })
        });
        Arc::clone(place)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::profile::Parking;

    const RETRY: Retry = Retry {
        first: Duration::from_secs(30),
        longest: Duration::from_secs(100),
    };

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
            of(profile().session(Language::Python)),
            of(profile().session(Language::Shell)),
            of(profile().prelude("1")),
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
        let templates = Templates::<u32, ()>::new(RETRY);
        let made = AtomicU32::new(0);
        let ask = |profile: Profile, outcome: Result<(), Unmade<()>>| {
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
            (Ok(Some(0)), Ok(Some(0)), Ok(Some(0)))
        );
        assert_eq!(three().await, Ok(Some(0)));
        // The same name with other inputs is another template.
        let other = || profile().env("A", "1");
        let cancelled = timeout(Duration::from_secs(1), ask(other(), Ok(()))).await;
        assert!(cancelled.is_err());
        let no_guest = Err(Unmade::NoGuest(()));
        assert_eq!(
            tokio::join!(ask(other(), no_guest), ask(other(), Ok(()))),
            (Err(()), Ok(Some(2)))
        );
        assert_eq!(made.load(Ordering::Relaxed), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_done_without_and_tried_again_by_one_at_a_time_ever_less_often() {
        let templates = Templates::<(), u32>::new(RETRY);
        let tries = AtomicU32::new(0);
        let ask = |outcome: fn(u32) -> Result<(), Unmade<u32>>| {
            let (templates, tries) = (&templates, &tries);
            async move {
                let make = || async {
                    sleep(Duration::from_secs(1)).await;
                    outcome(tries.fetch_add(1, Ordering::Relaxed))
                };
                let ingredients = Ingredients::from(&profile());
                templates.get_or_make(ingredients, make).await
            }
        };
        let why = || {
            templates
                .setback(Ingredients::from(&profile()))
                .map(|why| *why)
        };
        let refused = || ask(|number| Err(Unmade::Refused(number)));
        // Both wait for the first try; the second caller does not try itself.
        assert_eq!(tokio::join!(refused(), refused()), (Ok(None), Ok(None)));
        assert_eq!((tries.load(Ordering::Relaxed), why()), (1, Some(0)));
        for (number, wait) in [(1, 30), (2, 60), (3, 100), (4, 100)] {
            sleep(Duration::from_secs(wait - 1)).await;
            assert_eq!(refused().await, Ok(None));
            assert_eq!(tries.load(Ordering::Relaxed), number, "not yet");
            sleep(Duration::from_secs(1)).await;
            let began = Instant::now();
            let other = async {
                sleep(Duration::from_millis(1)).await;
                let other = refused().await;
                (other, began.elapsed() < Duration::from_millis(10))
            };
            let (mine, other) = tokio::join!(refused(), other);
            assert_eq!((mine, other), (Ok(None), (Ok(None), true)), "nobody waits");
            assert_eq!(
                (tries.load(Ordering::Relaxed), why()),
                (number + 1, Some(number))
            );
        }
        // After a try that is cancelled, or has no guest, the next one is made when it is due.
        sleep(Duration::from_secs(100)).await;
        let given_up = timeout(Duration::from_millis(500), refused()).await;
        assert!(given_up.is_err());
        assert_eq!(refused().await, Ok(None));
        sleep(Duration::from_secs(100)).await;
        let no_guest = ask(|number| Err(Unmade::NoGuest(number))).await;
        assert_eq!((no_guest, why()), (Err(5), Some(4)));
        sleep(Duration::from_secs(100)).await;
        assert_eq!(ask(|_| Ok(())).await, Ok(Some(())));
        assert_eq!(why(), None);
        assert_eq!(refused().await, Ok(Some(())));
    }
}
