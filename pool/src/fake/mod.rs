//! A backend whose every answer is scripted: for tests of pools, and of programs that use one.
//!
//! ```
//! use hearth_pool::fake::{Boot, FakeBackend};
//! let fake = FakeBackend::new();
//! fake.script("python", [Boot::Fail("no such image"), Boot::Fine]);
//! ```

mod fault;
mod gate;
mod host;
mod script;
mod vm;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::error::Error;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use fault::Faults;
pub use fault::Method;
use futures::FutureExt;
use futures::future::BoxFuture;
pub use gate::Gate;
pub use host::FakeHost;
pub use script::{Boot, Ping};
use tokio::time::sleep;
use vm::Life;
pub use vm::{FakeRemote, FakeVm, FakeVmError, FakeVmHandle};

use crate::backend::{Backend, Making, ProbeError};
use crate::guard;
use crate::profile::{Parking, Profile};
use crate::slot::VmId;

/// The private memory that every fake VM reports.
const PRIVATE_BYTES: u64 = 1 << 20;

/// The error of [`Boot::Fail`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct FakeError(pub &'static str);

/// Counters of one profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Boots begun.
    pub boots: usize,
    /// Boots under way now.
    pub booting: usize,
    /// Most boots under way at a time.
    pub most_booting: usize,
    /// VMs made.
    pub created: usize,
    /// VMs destroyed through [`Backend::retire`].
    pub retired: usize,
    /// VMs that were dropped otherwise.
    pub dropped: usize,
    /// VMs that exist now, leased or not.
    pub live: usize,
}

#[derive(Default)]
struct World {
    tallies: HashMap<String, Tally>,
    scripts: HashMap<String, VecDeque<Boot>>,
    defaults: HashMap<String, Boot>,
    prepare: HashMap<String, VecDeque<Boot>>,
    pings: HashMap<String, VecDeque<Ping>>,
    /// Percent of boots that fail, and the state of the random generator that picks them.
    failing: (u64, u64),
    retire: Option<Gate>,
    settle: Option<Gate>,
    faults: Faults,
    /// Template errors, by profile.
    refused: HashMap<String, Arc<FakeError>>,
    vms: BTreeMap<VmId, Weak<Life>>,
}

/// See the [module](self). Clones are the same backend.
#[derive(Clone, Default)]
pub struct FakeBackend {
    world: Arc<Mutex<World>>,
    parking: Option<Parking>,
    making: Option<Making>,
    time_scale: Option<u32>,
}

impl FakeBackend {
    /// A backend whose boots all succeed at once and whose pings are all answered.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how parked VMs wait unless configured.
    #[must_use]
    pub fn with_parking(mut self, parking: Parking) -> Self {
        self.parking = Some(parking);
        self
    }

    /// Sets how the backend says that its VMs are made; [`Making::Boot`] unless set.
    #[must_use]
    pub fn with_making(mut self, making: Making) -> Self {
        self.making = Some(making);
        self
    }

    /// Sets the factor on every timeout that the backend asks for.
    #[must_use]
    pub fn with_time_scale(mut self, factor: u32) -> Self {
        self.time_scale = Some(factor);
        self
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Scripts the next boots of `profile`, in order.
    pub fn script(&self, profile: &str, boots: impl IntoIterator<Item = Boot>) {
        self.world()
            .scripts
            .entry(profile.to_owned())
            .or_default()
            .extend(boots);
    }

    /// Removes the scripted boots of `profile` that have not begun.
    pub fn unscript(&self, profile: &str) {
        self.world().scripts.remove(profile);
    }

    /// Sets how boots of `profile` go that are not scripted.
    pub fn by_default(&self, profile: &str, boot: Boot) {
        self.world().defaults.insert(profile.to_owned(), boot);
    }

    /// Scripts the next preparations of `profile`, in order.
    pub fn script_prepare(&self, profile: &str, steps: impl IntoIterator<Item = Boot>) {
        self.world()
            .prepare
            .entry(profile.to_owned())
            .or_default()
            .extend(steps);
    }

    /// Scripts the first pings of all VMs of `profile` that are made from now on.
    pub fn script_pings(&self, profile: &str, pings: impl IntoIterator<Item = Ping>) {
        self.world()
            .pings
            .insert(profile.to_owned(), pings.into_iter().collect());
    }

    /// Makes this percentage of the boots that are not scripted fail, drawn from `seed`.
    pub fn fail_percent(&self, percent: u64, seed: u64) {
        self.world().failing = (percent, seed | 1);
    }

    /// Makes every destruction wait for `gate`.
    pub fn gate_retire(&self, gate: Option<Gate>) {
        self.world().retire = gate;
    }

    /// Makes [`Backend::settled`] wait for `gate`, as if something were left of a cancelled boot or
    /// preparation until then.
    pub fn gate_settle(&self, gate: Option<Gate>) {
        self.world().settle = gate;
    }

    /// Makes the template of `profile` fail with the error `why`; none: it succeeds. Each call with
    /// an error is a new failure.
    pub fn refuse_template(&self, profile: &str, why: Option<&'static str>) {
        let refused = &mut self.world().refused;
        match why {
            Some(why) => refused.insert(profile.to_owned(), Arc::new(FakeError(why))),
            None => refused.remove(profile),
        };
    }

    /// Makes the next call of a method panic.
    pub fn panic_in(&self, method: Method) {
        self.world().faults.arm(method);
    }

    fn trip(&self, method: Method) {
        let armed = self.world().faults.disarm(method);
        if armed {
            resume_unwind(Box::new("a scripted panic"));
        }
    }

    /// Returns the counters of `profile`.
    #[must_use]
    pub fn tally(&self, profile: &str) -> Tally {
        self.world()
            .tallies
            .get(profile)
            .copied()
            .unwrap_or_default()
    }

    /// VMs that exist now.
    #[must_use]
    pub fn live(&self) -> Vec<FakeVmHandle> {
        let world = self.world();
        world
            .vms
            .values()
            .filter_map(Weak::upgrade)
            .map(FakeVmHandle::new)
            .collect()
    }

    /// One VM that exists now.
    #[must_use]
    pub fn vm(&self, id: VmId) -> Option<FakeVmHandle> {
        self.world()
            .vms
            .get(&id)
            .and_then(Weak::upgrade)
            .map(FakeVmHandle::new)
    }

    /// Makes a VM outside of any pool, to offer it to one.
    #[must_use]
    pub fn make(&self, profile: &str) -> FakeVm {
        // Numbers from the top of the range, so that they do not collide with those of a pool.
        let others = u64::try_from(self.world().vms.len()).unwrap_or(0);
        self.make_as(profile, VmId(u64::MAX - others))
    }

    fn make_as(&self, profile: &str, id: VmId) -> FakeVm {
        let mut world = self.world();
        let pings = world.pings.get(profile).cloned().unwrap_or_default();
        let life = Life::new(id, profile, pings);
        world.vms.insert(id, Arc::downgrade(&life));
        let tally = world.tallies.entry(profile.to_owned()).or_default();
        tally.created += 1;
        tally.live += 1;
        FakeVm {
            life,
            backend: self.clone(),
            retired: false,
        }
    }

    fn next_boot(&self, profile: &str) -> Boot {
        let mut world = self.world();
        if let Some(boot) = world.scripts.get_mut(profile).and_then(VecDeque::pop_front) {
            return boot;
        }
        let (percent, state) = &mut world.failing;
        if *percent > 0 {
            *state ^= *state << 13;
            *state ^= *state >> 7;
            *state ^= *state << 17;
            if *state % 100 < *percent {
                return Boot::Fail("drawn to fail");
            }
        }
        world.defaults.get(profile).cloned().unwrap_or(Boot::Fine)
    }

    /// Called by the VM's drop.
    fn gone(&self, life: &Life, retired: bool) {
        let mut world = self.world();
        world.vms.remove(&life.id);
        if let Some(tally) = world.tallies.get_mut(&life.profile) {
            tally.live -= 1;
            if retired {
                tally.retired += 1;
            } else {
                tally.dropped += 1;
            }
        }
    }
}

/// Drop guard that counts a boot as under way, however it ends.
struct UnderWay<'a>(&'a FakeBackend, &'a str);

impl<'a> UnderWay<'a> {
    fn new(backend: &'a FakeBackend, profile: &'a str) -> Self {
        let mut world = backend.world();
        let tally = world.tallies.entry(profile.to_owned()).or_default();
        tally.boots += 1;
        tally.booting += 1;
        tally.most_booting = tally.most_booting.max(tally.booting);
        drop(world);
        Self(backend, profile)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if let Some(tally) = self.0.world().tallies.get_mut(self.1) {
            tally.booting -= 1;
        }
    }
}

async fn follow(boot: &Boot) -> Result<(), FakeError> {
    match boot {
        Boot::Fine | Boot::Dead | Boot::Frozen => Ok(()),
        Boot::After(time) => {
            sleep(*time).await;
            Ok(())
        }
        Boot::Gate(gate) => {
            gate.pass().await;
            Ok(())
        }
        Boot::Fail(why) => Err(FakeError(why)),
        Boot::FailAfter(time, why) => {
            sleep(*time).await;
            Err(FakeError(why))
        }
        Boot::Hang => std::future::pending().await,
        Boot::Panic => resume_unwind(Box::new("a scripted panic")),
    }
}

impl Backend for FakeBackend {
    type Vm = FakeVm;
    type Remote = FakeRemote;
    type Error = FakeError;

    async fn prepare(&self, profile: &Profile) -> Result<(), FakeError> {
        let step = self
            .world()
            .prepare
            .get_mut(&profile.name)
            .and_then(VecDeque::pop_front);
        follow(&step.unwrap_or(Boot::Fine)).await
    }

    async fn create(&self, profile: &Profile, id: VmId) -> Result<FakeVm, FakeError> {
        let _under_way = UnderWay::new(self, &profile.name);
        let boot = self.next_boot(&profile.name);
        follow(&boot).await?;
        let vm = self.make_as(&profile.name, id);
        match boot {
            Boot::Dead => vm.handle().kill(),
            Boot::Frozen => vm.handle().freeze(),
            _ => {}
        }
        Ok(vm)
    }

    fn probe(&self, vm: &FakeVm) -> BoxFuture<'static, Result<(), ProbeError>> {
        vm.life.clone().probe().boxed()
    }

    async fn retire(&self, mut vm: FakeVm) {
        self.trip(Method::Retire);
        let gate = self.world().retire.clone();
        if let Some(gate) = gate {
            gate.pass().await;
        }
        vm.retired = true;
    }

    fn ended(&self, vm: &FakeVm) -> BoxFuture<'static, ()> {
        self.trip(Method::Ended);
        let (fake, ended) = (self.clone(), vm.life.ended());
        async move {
            fake.trip(Method::Watch);
            ended.await;
        }
        .boxed()
    }

    fn alive(&self, vm: &FakeVm) -> bool {
        self.trip(Method::Alive);
        vm.life.is_alive()
    }

    fn remote(&self, vm: &FakeVm) -> FakeRemote {
        self.trip(Method::Remote);
        FakeRemote(Arc::downgrade(&vm.life))
    }

    fn pause(&self, vm: &FakeVm) {
        self.trip(Method::Pause);
        if !vm.life.is_alive() {
            // As the KVM backend does.
            guard::later(|| tracing::debug!("a parked VM was not paused"));
        }
        vm.life.set_paused(true);
    }

    fn resume(&self, vm: &FakeVm) {
        self.trip(Method::Resume);
        vm.life.set_paused(false);
    }

    fn fits(&self, vm: &FakeVm, profile: &Profile) -> bool {
        vm.life.fits(&profile.name)
    }

    fn hand_off(&self, vm: &FakeVm) {
        vm.life.hand_off();
    }

    fn private_bytes(&self, _vm: &FakeVm) -> Option<u64> {
        self.trip(Method::PrivateBytes);
        Some(PRIVATE_BYTES)
    }

    async fn settled(&self) {
        self.trip(Method::Settled);
        let gate = self.world().settle.clone();
        if let Some(gate) = gate {
            gate.pass().await;
        }
    }

    fn making(&self, profile: &Profile) -> Making {
        match self.no_template(profile) {
            Some(_) => Making::Boot,
            None => self.making.unwrap_or(Making::Boot),
        }
    }

    fn no_template(&self, profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        let why = self.world().refused.get(&profile.name).cloned()?;
        Some(why)
    }

    fn time_scale(&self) -> u32 {
        self.time_scale.unwrap_or(1)
    }

    fn parking(&self, _profile: &Profile) -> Parking {
        self.parking.unwrap_or(Parking::Running)
    }
}
