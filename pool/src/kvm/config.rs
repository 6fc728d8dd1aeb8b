//! The configuration of the backend, and the files that it makes guests from.

use std::collections::HashMap;
use std::io;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use hearth_vmm::{CpuProfile, Host, VcpuThread};
use tokio::sync::Semaphore;

use super::KvmBackend;
use super::birth::Births;
use super::store::{DEFAULT_LIMIT, Store};
use super::templates::{Retry, Templates};
use crate::config::PoolConfig;

/// How guests are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// One boot per profile becomes a template at the start; VMs are its forks. If the guest boots
    /// and cannot be made a template (the host refuses, or is out of memory), VMs boot from cold.
    /// The first boot after `boot.breaker_cooldown_ms`, which doubles up to
    /// `boot.breaker_cooldown_max_ms`, tries the template again.
    #[default]
    Fork,
    /// Every VM boots from cold.
    Boot,
}

/// The files of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvmImage {
    /// An uncompressed ELF kernel (or another format that the monitor takes).
    pub kernel: PathBuf,
    /// The initramfs; its `/init` is the agent.
    pub initramfs: PathBuf,
    /// An EROFS file system that becomes the guest's root (see `hearth image import`); without it
    /// a guest has only the agent's few built-in programs. All guests share one copy in the
    /// host's memory; each one's writes are its own.
    pub root: Option<PathBuf>,
    /// How much of a guest's memory its programs may fill with what they write over the root file
    /// system, in MiB. The default is 60 % of it.
    pub layer_mib: Option<u32>,
    /// Extra kernel parameters.
    pub append: String,
}

impl KvmImage {
    /// An image of this kernel and this initramfs, without a root file system.
    pub fn new(kernel: impl Into<PathBuf>, initramfs: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: initramfs.into(),
            root: None,
            layer_mib: None,
            append: String::new(),
        }
    }

    /// Sets the root file system.
    #[must_use]
    pub fn root(mut self, image: impl Into<PathBuf>) -> Self {
        self.root = Some(image.into());
        self
    }

    /// Limits how much programs write over the root file system, in MiB.
    #[must_use]
    pub fn layer_mib(mut self, mib: u32) -> Self {
        self.layer_mib = Some(mib);
        self
    }
}

/// How many clones are made at a time. Until its first pong a clone needs a processor, most of all
/// on an emulated host: more of them at once would only slow each other down with their timer
/// ticks.
fn forks_at_once(cpu: CpuProfile) -> usize {
    let processors = available_parallelism().map_or(1, NonZero::get);
    match cpu {
        CpuProfile::Emulated => processors,
        CpuProfile::Native => 4 * processors,
    }
}

/// Builds a [`KvmBackend`].
#[derive(Debug)]
#[must_use]
pub struct KvmBackendBuilder(KvmBackend);

impl KvmBackendBuilder {
    pub(super) fn new(config: &PoolConfig, host: &Host) -> Self {
        let (cpu, timeout_factor) = (host.profile(), host.timeout_factor());
        let scaled = |ms| Duration::from_millis(ms).saturating_mul(timeout_factor);
        Self(KvmBackend {
            images: HashMap::new(),
            made_for: (config.boot.clone(), config.balloon.clone()),
            source: Source::default(),
            cpu,
            timeout_factor,
            place: None,
            connect_timeout: scaled(config.boot.connect_timeout_ms),
            boot_timeout: scaled(config.boot.timeout_ms),
            balloon_timeout: scaled(config.balloon.timeout_ms),
            balloon_idle_mib: config.balloon.idle_target_mib,
            templates: Templates::new(Retry {
                first: Duration::from_millis(config.boot.breaker_cooldown_ms),
                longest: Duration::from_millis(config.boot.breaker_cooldown_max_ms),
            }),
            store: Store::default_dir().map(|dir| Store::new(dir, DEFAULT_LIMIT)),
            births: Births::default(),
            turns: Semaphore::new(forks_at_once(cpu)),
        })
    }

    /// Sets the image that profiles call `name`.
    pub fn image(mut self, name: impl Into<String>, image: KvmImage) -> Self {
        self.0.images.insert(name.into(), image);
        self
    }

    /// Sets how guests are made.
    pub fn source(mut self, source: Source) -> Self {
        self.0.source = source;
        self
    }

    /// Keeps templates in `dir`, at most `limit` bytes of them, so that they outlast the process.
    /// The default is 4 GiB in `$XDG_CACHE_HOME/hearth/templates`. An entry is the memory of a
    /// booted guest, including what the profile's warm-up command left there; only this user can
    /// read it.
    ///
    /// A cache that cannot be used is no error: an unreadable entry is made again, a failed write
    /// is logged.
    pub fn template_cache(mut self, dir: impl Into<PathBuf>, limit: u64) -> Self {
        self.0.store = Some(Store::new(dir.into(), limit));
        self
    }

    /// Has `place` decide where the vCPU threads of all guests run (see
    /// [`VmConfigBuilder::place_vcpus`](hearth_vmm::VmConfigBuilder::place_vcpus)): on which
    /// processors, in which control group, beside which other threads. If `place` fails, the guest
    /// is not made. It is called on threads of the backend's.
    pub fn place_vcpus(
        mut self,
        place: impl Fn(&VcpuThread) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        self.0.place = Some(Arc::new(place));
        self
    }

    /// Disables the template cache: each process makes its templates anew.
    pub fn no_template_cache(mut self) -> Self {
        self.0.store = None;
        self
    }

    /// Returns the backend.
    #[must_use]
    pub fn build(self) -> KvmBackend {
        self.0
    }
}
