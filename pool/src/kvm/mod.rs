//! The backend that runs real guests on KVM: forks of a template, or cold boots where there is
//! none.

mod activity;
mod birth;
mod capture;
mod config;
mod control;
mod guest;
mod make;
mod session;
mod store;
mod stream;
mod templates;
mod workers;

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use activity::Activity;
use birth::{Birth, Births};
pub use config::{KvmBackendBuilder, KvmImage, Source};
use futures::FutureExt;
use futures::future::BoxFuture;
use guest::End;
pub use guest::{Guest, GuestError};
use hearth_vmm::{CpuProfile, Host, HostError, Template, VcpuThread, VmStatus};
pub use make::CreateError;
pub use session::Session;
use store::Store;
pub use stream::GuestStream;
use templates::Templates;
use tokio::sync::Semaphore;
pub use workers::WorkError;

use crate::backend::{Backend, Making, ProbeError, Remote};
use crate::config::{BalloonConfig, BootConfig, PoolConfig, Problem};
use crate::guard;
use crate::profile::{Parking, Profile};
use crate::slot::VmId;

type Place = dyn Fn(&VcpuThread) -> io::Result<()> + Send + Sync;

/// Makes guests from images. Build one with [`KvmBackend::builder`].
pub struct KvmBackend {
    images: HashMap<String, KvmImage>,
    /// The parts of the configuration that the backend was built with.
    made_for: (BootConfig, BalloonConfig),
    source: Source,
    cpu: CpuProfile,
    timeout_factor: u32,
    /// Decides where vCPU threads run.
    place: Option<Arc<Place>>,
    connect_timeout: Duration,
    boot_timeout: Duration,
    balloon_timeout: Duration,
    balloon_idle_mib: u32,
    templates: Templates<Template, CreateError>,
    /// The on-disk cache in which templates outlast the process.
    store: Option<Store>,
    births: Births,
    /// Limits how many clones are made at a time.
    turns: Semaphore,
}

impl fmt::Debug for KvmBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmBackend")
            .field("images", &self.images)
            .field("source", &self.source)
            .field("cpu", &self.cpu)
            .finish_non_exhaustive()
    }
}

impl KvmBackend {
    /// Returns a builder of a backend for this host, and for pools of this configuration:
    /// [`Pool::new`](crate::Pool::new) refuses a configuration whose timeouts or balloon settings
    /// differ.
    ///
    /// # Errors
    /// The reason why KVM cannot be used, and what to do about it.
    pub fn builder(config: &PoolConfig) -> Result<KvmBackendBuilder, HostError> {
        Ok(KvmBackendBuilder::new(config, Host::get()?))
    }

    fn image(&self, profile: &Profile) -> Result<&KvmImage, CreateError> {
        self.images.get(&profile.image).ok_or_else(|| {
            let mut known: Vec<_> = self.images.keys().cloned().collect();
            known.sort();
            CreateError::NoImage {
                image: profile.image.clone(),
                known,
            }
        })
    }

    /// Returns `None` if there is no template, and VMs boot from cold for now.
    async fn template(&self, profile: &Profile) -> Result<Option<Template>, CreateError> {
        let make = || self.find_or_make_template(profile);
        self.templates.get_or_make(profile.into(), make).await
    }

    /// A fork of the profile's template if it has one, else a cold boot.
    async fn fork_or_boot(
        &self,
        profile: &Profile,
        id: VmId,
        birth: &Birth,
    ) -> Result<Guest, CreateError> {
        match self.template(profile).await? {
            Some(template) => self.fork(profile, id, template, birth).await,
            None => self.boot(profile, birth).await,
        }
    }
}

impl Backend for KvmBackend {
    type Vm = Guest;
    type Remote = GuestRemote;
    type Error = CreateError;

    async fn prepare(&self, profile: &Profile) -> Result<(), CreateError> {
        match self.source {
            Source::Boot => self.preload(profile).await,
            Source::Fork => self.template(profile).await.map(drop),
        }
    }

    async fn create(&self, profile: &Profile, id: VmId) -> Result<Guest, CreateError> {
        let birth = self.births.begin();
        let mut guest = match self.source {
            Source::Boot => self.boot(profile, &birth).await?,
            Source::Fork => self.fork_or_boot(profile, id, &birth).await?,
        };
        guest.weigh().await;
        birth.done();
        Ok(guest)
    }

    fn probe(&self, vm: &Guest) -> BoxFuture<'static, Result<(), ProbeError>> {
        let control = Arc::clone(vm.control());
        let (dial, gone) = (vm.dialler(), vm.exited());
        async move {
            tokio::select! {
                biased;
                _ = gone => Err(ProbeError::Dead),
                verdict = control.probe(dial.dial()) => verdict,
            }
        }
        .boxed()
    }

    async fn retire(&self, vm: Guest) {
        vm.end().bring_about().await;
    }

    async fn settled(&self) {
        self.births.settled().await;
    }

    fn ended(&self, vm: &Guest) -> BoxFuture<'static, ()> {
        vm.exited().map(drop).boxed()
    }

    fn alive(&self, vm: &Guest) -> bool {
        !matches!(vm.vm().status(), VmStatus::Ended(_))
    }

    fn remote(&self, vm: &Guest) -> GuestRemote {
        GuestRemote {
            end: vm.end(),
            activity: Arc::clone(vm.activity()),
        }
    }

    fn pause(&self, vm: &Guest) {
        if let Err(error) = vm.vm().request_pause() {
            guard::later(move || tracing::debug!(%error, "a parked VM was not paused"));
        }
    }

    fn resume(&self, vm: &Guest) {
        // Fails only if the VM has ended, which the following probe detects.
        let _ = vm.vm().resume();
    }

    fn fits(&self, vm: &Guest, profile: &Profile) -> bool {
        vm.fits(profile)
    }

    fn hand_off(&self, vm: &Guest) {
        vm.set_handed_out();
        self.resume(vm);
        if vm.is_inflated() {
            // The guest deflates in the background, under its owner; a target of 0 is always valid.
            let _ = vm.vm().balloon().set_target(0);
        }
    }

    fn conflicts(&self, config: &PoolConfig) -> Vec<Problem> {
        let (boot, balloon) = &self.made_for;
        let same = |field: &str, mine: u64, pools: u64| {
            (mine != pools).then(|| Problem {
                field: field.to_owned(),
                what: format!(
                    "is {pools}, and the backend was built with {mine}: build it with the pool's configuration"
                ),
            })
        };
        let (boots, balloons) = (&config.boot, &config.balloon);
        let found = [
            same("boot.timeout_ms", boot.timeout_ms, boots.timeout_ms),
            same(
                "boot.connect_timeout_ms",
                boot.connect_timeout_ms,
                boots.connect_timeout_ms,
            ),
            same(
                "boot.breaker_cooldown_ms",
                boot.breaker_cooldown_ms,
                boots.breaker_cooldown_ms,
            ),
            same(
                "boot.breaker_cooldown_max_ms",
                boot.breaker_cooldown_max_ms,
                boots.breaker_cooldown_max_ms,
            ),
            same(
                "balloon.idle_target_mib",
                balloon.idle_target_mib.into(),
                balloons.idle_target_mib.into(),
            ),
            same(
                "balloon.timeout_ms",
                balloon.timeout_ms,
                balloons.timeout_ms,
            ),
        ];
        found.into_iter().flatten().collect()
    }

    /// Parks guests of emulated hosts paused: an idle one costs a percent or two of a core.
    fn parking(&self, _profile: &Profile) -> Parking {
        match self.cpu {
            CpuProfile::Native => Parking::Running,
            CpuProfile::Emulated => Parking::Paused,
        }
    }

    fn time_scale(&self) -> u32 {
        self.timeout_factor
    }

    fn private_bytes(&self, vm: &Guest) -> Option<u64> {
        vm.private_bytes()
    }

    fn failure_kind(&self, error: &CreateError) -> &'static str {
        error.kind()
    }

    fn making(&self, profile: &Profile) -> Making {
        match self.source {
            Source::Fork if self.no_template(profile).is_none() => Making::Fork,
            Source::Fork | Source::Boot => Making::Boot,
        }
    }

    fn no_template(&self, profile: &Profile) -> Option<Arc<dyn Error + Send + Sync>> {
        let why = self.templates.setback(profile.into())?;
        Some(why)
    }
}

/// Ends a guest that the holder of this handle does not own, and reads its activity.
pub struct GuestRemote {
    end: End,
    activity: Arc<Activity>,
}

impl Remote for GuestRemote {
    async fn kill(&self) {
        self.end.bring_about().await;
    }

    fn activity(&self) -> u64 {
        self.activity.reading()
    }
}
