//! The parts of a VM, its creation and its teardown.
//!
//! A [`VmInner`] is torn down in this order: streams end, vCPU threads are stopped and leave it (in
//! bounded time), the event thread lets go, KVM is closed, and only then memory is unmapped. A VM
//! whose vCPU threads do not leave in time is kept whole: nothing is unmapped under them. It counts
//! as leaked, and is logged, until they leave (see [`crate::teardown`]).

use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot;
use crate::boot_error::BootError;
use crate::bus::{DeviceBus, SharedTransport};
use crate::config::{MAX_VCPUS, VmConfig};
use crate::cpu::{cpuid, setup};
use crate::devices::Devices;
use crate::hardware::Hardware;
use crate::host::{self, CpuProfile, Host};
use crate::layout;
use crate::legacy::console::Console;
use crate::memory::GuestRam;
use crate::reactor::{Attachment, Reactor, ReactorError};
use crate::saved::VmState;
use crate::sigbus::{self, Watch};
use crate::state::Exit;
use crate::teardown::{STOP_BOUND, Teardown, TeardownQueue};
use crate::vcpu::control::{RunState, VcpuControl};
use crate::vcpu::exit_event::ExitEvent;
use crate::vcpu::stats::VcpuStats;
use crate::vcpu::thread_pool::{VcpuThreads, replenish};
use crate::vcpu::{ExitCounters, Vcpu, VcpuError};
use crate::virtio::DeviceState;
use crate::virtio::balloon::Balloon;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::pmem::{PmemError, PmemFile, PmemImage, place};
use crate::virtio::vsock::VsockHost;
use crate::vm_fds::{BASE_DEVICES, DeviceEvents, PlacedImage, VmFds};

/// Returns the queue of the process.
pub(crate) fn teardown_queue() -> &'static Arc<TeardownQueue<VmInner>> {
    static SHARED: LazyLock<Arc<TeardownQueue<VmInner>>> = LazyLock::new(Arc::default);
    &SHARED
}

/// Returns the number of VMs of this process whose vCPU threads could not be stopped in 5 s and
/// still run: their memory is mapped as long as the threads run. Anything but zero is a fault of
/// the host's kernel or of this library.
#[must_use]
pub fn leaked_vms() -> u64 {
    teardown_queue().leaked.load(Ordering::Relaxed)
}

/// How long the steps of creating a VM took.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct CreateTimes {
    /// Reading kernel and initramfs files; nothing from the second boot of a configuration on.
    pub image: Duration,
    /// Creating guest memory, mapping the kernel image into it, writing boot structures.
    pub load: Duration,
    /// Creating KVM's VM, memory slots, interrupt controllers, vCPUs and the device eventfds.
    pub kvm: Duration,
    /// Creating devices and starting threads.
    pub devices: Duration,
}

/// The parts of a VM. [`VmInner::teardown`] runs at drop and releases them in order; only the
/// position of the last field matters.
#[derive(Debug)]
pub(crate) struct VmInner {
    pub(crate) control: Arc<VcpuControl>,
    pub(crate) exit_event: Arc<ExitEvent>,
    pub(crate) exits: Arc<ExitCounters>,
    pub(crate) console: Console,
    pub(crate) vsock: VsockHost,
    pub(crate) balloon: Balloon,
    pub(crate) bus: Arc<DeviceBus>,
    pub(crate) times: CreateTimes,
    /// Statistics of the vCPUs, if instructions are counted. Each keeps the VM alive in the
    /// kernel.
    pub(crate) stats: Vec<VcpuStats>,
    pub(crate) hardware: Hardware,
    watch: Arc<Watch>,
    /// Empty once the vCPU threads are started.
    vcpus: Vec<VcpuFd>,
    attachment: Option<Attachment>,
    /// Closed after the vCPU threads have left; these own the vCPU fds.
    pub(crate) vm: Option<Arc<VmFd>>,
    /// Unmapped last.
    pub(crate) ram: Option<GuestRam>,
    images: Vec<PlacedImage>,
    /// Dropped after everything else.
    pub(crate) drop_guards: DropGuards,
}

/// Drop guards kept for the embedding program; dropped with the last clone of this value.
#[derive(Clone, Default)]
pub(crate) struct DropGuards(Arc<Mutex<Vec<Box<dyn Send>>>>);

impl DropGuards {
    pub(crate) fn add(&self, piece: Box<dyn Send>) {
        let mut pieces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.push(piece);
    }
}

impl std::fmt::Debug for DropGuards {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DropGuards")
    }
}

impl VmInner {
    /// Creates a VM that boots `config`; its vCPUs are paused.
    pub(crate) fn create(config: &VmConfig) -> Result<VmInner, BootError> {
        let host = Host::get()?;
        config.check_vcpus(
            u8::try_from(host.max_vcpus())
                .unwrap_or(u8::MAX)
                .min(MAX_VCPUS),
        )?;
        let hardware = Hardware {
            memory_bytes: config.memory_bytes,
            vcpus: config.vcpus,
            console: config.console,
            pit: config.pit,
            pmu: config.pmu,
            profile: config.profile.unwrap_or(host.profile()),
            limits: config.limits,
        };
        let mut times = CreateTimes::default();

        let start = Instant::now();
        config.preload()?;
        times.image = start.elapsed();

        let start = Instant::now();
        let mut ram = GuestRam::with_pages(config.memory_bytes, config.huge_pages)?;
        let images = place_images(host, config)?;
        let count = BASE_DEVICES + images.len();
        let devices: Vec<String> = (0..).take(count).map(device_word).collect();
        let words = config.cmdline(hardware.profile, &devices);
        let source = boot::Source {
            payload: &config.payload,
            words: &words,
            vcpus: config.vcpus,
            lines: &layout::interrupt_lines(count as u32, hardware.console),
            entry: config.entry,
        };
        let entry = boot::load(&mut ram, &source)?;
        times.load = start.elapsed();

        let start = Instant::now();
        let mut fds = VmFds::new(host, hardware, ram, images)?;
        for (index, vcpu) in (0u8..).zip(&fds.vcpus) {
            setup::boot(vcpu, index, fds.ram.map(), &entry)?;
        }
        times.kvm = start.elapsed();

        let start = Instant::now();
        let irq = fds.serial.take();
        let devices = Devices::new(hardware, &fds.images, &fds.device_events, irq)?;
        let mut inner = Self::assemble(hardware, fds, devices);
        if config.count_instructions {
            inner.count_instructions();
        }
        times.devices = start.elapsed();
        inner.times = times;
        let vcpu_threads =
            VcpuThreads::acquire(hardware.vcpus, hardware.limits, config.placement.as_ref())?;
        inner.start_surely(vcpu_threads, RunState::Pause)?;
        Ok(inner)
    }

    /// Prepares a VM to continue from `state`, whose memory and pmem images are those of `fds`.
    /// Restores the devices, which stay asleep; the rest is left to [`VmInner::restore`].
    pub(crate) fn prepare(state: &VmState, mut fds: VmFds) -> Result<VmInner, BootError> {
        let start = Instant::now();
        if state.vcpus.len() != fds.vcpus.len() {
            return Err(BootError::State("not as many vCPUs as the VM has".into()));
        }
        let irq = fds.serial.take();
        let devices = Devices::restore(state, &fds.images, &fds.device_events, irq)?;
        let mut inner = Self::assemble(state.hardware, fds, devices);
        for (transport, saved) in inner.bus.virtio.iter().zip(&state.transports) {
            transport
                .lock()
                .restore(saved)
                .map_err(|e| BootError::State(e.to_string()))?;
        }
        inner.times.devices = start.elapsed();
        Ok(inner)
    }

    /// Restores the rest of `state` into a VM prepared from it. Its vCPUs have no threads yet, or
    /// are parked.
    pub(crate) fn restore(&mut self, state: &VmState) -> Result<(), BootError> {
        let start = Instant::now();
        let Some(vm) = &self.vm else {
            return Err(BootError::State("the VM was torn down".into()));
        };
        state.chips.restore(vm)?;
        for (index, saved) in state.vcpus.iter().enumerate() {
            let restore = |vcpu: &VcpuFd| saved.restore(vcpu, index, state.hardware.profile);
            match self.vcpus.get(index) {
                Some(vcpu) => restore(vcpu)?,
                None => self
                    .control
                    .with_vcpu(index, |vcpu| restore(vcpu))
                    .ok_or_else(|| BootError::State("a vCPU's thread is gone".into()))??,
            }
        }
        self.times.kvm += start.elapsed();
        let start = Instant::now();
        // The interrupt controllers can take interrupts now.
        for transport in &self.bus.virtio {
            transport.lock().begin();
        }
        if let Some(serial) = &self.bus.serial {
            serial.begin();
        }
        self.times.devices += start.elapsed();
        Ok(())
    }

    /// Waits until all vCPU threads are parked or have ended; false after [`STOP_BOUND`].
    pub(crate) fn settle(&self) -> bool {
        self.control.settle(STOP_BOUND)
    }

    /// Assembles all parts but the vCPU threads and the attachment to an event thread.
    fn assemble(hardware: Hardware, fds: VmFds, devices: Devices) -> VmInner {
        let VmFds {
            vcpus,
            vm,
            device_events,
            images,
            ram,
            ..
        } = fds;
        let virtio = devices.virtio.into_iter().zip(device_events);
        let virtio = virtio.map(
            |(
                device,
                DeviceEvents {
                    doorbell,
                    interrupt,
                },
            )| {
                SharedTransport::new(MmioTransport::new(device, ram.clone(), doorbell, interrupt))
            },
        );
        let bus = Arc::new(DeviceBus {
            serial: devices.serial,
            virtio: virtio.collect(),
            registers: (hardware.profile == CpuProfile::Emulated).then(|| ram.clone()),
        });
        let control = Arc::new(VcpuControl::new(vcpus.len(), RunState::Pause));
        let exit_event = Arc::new(ExitEvent::new(
            Arc::clone(&control),
            devices.console.clone(),
        ));
        exit_event.ends_streams(devices.vsock.clone());
        VmInner {
            hardware,
            watch: Watch::new(ram.clone()),
            control,
            exit_event,
            exits: Arc::new(ExitCounters::default()),
            console: devices.console,
            vsock: devices.vsock,
            balloon: devices.balloon,
            bus,
            times: CreateTimes::default(),
            stats: Vec::new(),
            vcpus,
            attachment: None,
            vm: Some(Arc::new(vm)),
            ram: Some(ram),
            images,
            drop_guards: DropGuards::default(),
        }
    }

    /// Counts emulated instructions, if the host can. Called before the start.
    pub(crate) fn count_instructions(&mut self) {
        // Counting is optional: a VM runs without it.
        let stats = self.vcpus.iter().map(VcpuStats::open);
        self.stats = stats.filter_map(Result::ok).collect();
    }

    /// Hands the vCPUs to their threads, which start in `run_state` at once: on a busy host, waking
    /// a thread that has just parked takes longer than all the rest of a fork. Then attaches the
    /// devices to an event thread; earlier notifications stay pending. A failure tears the
    /// half-made VM down by dropping it; a vCPU that proves unable to run ends it later.
    pub(crate) fn start(
        &mut self,
        vcpu_threads: VcpuThreads,
        run_state: RunState,
    ) -> Result<(), BootError> {
        self.launch(vcpu_threads, run_state, None)
    }

    /// As [`VmInner::start`], but waits until the vCPUs are known to be able to run: as long as KVM
    /// takes to create a thread.
    pub(crate) fn start_surely(
        &mut self,
        vcpu_threads: VcpuThreads,
        run_state: RunState,
    ) -> Result<(), BootError> {
        let (begun, vcpus_begun) = mpsc::channel();
        self.launch(vcpu_threads, run_state, Some(begun))?;
        let start = Instant::now();
        for vcpu in vcpus_begun {
            vcpu?;
        }
        self.times.devices += start.elapsed();
        Ok(())
    }

    fn launch(
        &mut self,
        mut vcpu_threads: VcpuThreads,
        run_state: RunState,
        begun: Option<Sender<Result<(), VcpuError>>>,
    ) -> Result<(), BootError> {
        let start = Instant::now();
        sigbus::install().map_err(VcpuError::Signal)?;
        // Started before the first vCPU, as the end of a vCPU may need them.
        let limits = self.hardware.limits;
        teardown_queue()
            .start()
            .map_err(|e| ReactorError(Box::new(e)))?;
        let reactor = Reactor::get(limits.seccomp)?;
        self.control.set(run_state);
        for (index, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let vcpu = Vcpu {
                index,
                fd: Some(fd),
                bus: Arc::clone(&self.bus),
                control: Arc::clone(&self.control),
                exit_event: Arc::clone(&self.exit_event),
                exits: Arc::clone(&self.exits),
                begun: begun.clone(),
                watch: Arc::clone(&self.watch),
            };
            vcpu_threads.next()?.run(vcpu)?;
        }
        let (virtio, exit_event) = (self.bus.virtio.clone(), Arc::clone(&self.exit_event));
        self.attachment = Some(reactor.attach(virtio, exit_event, Arc::clone(&self.watch))?);
        self.times.devices += start.elapsed();
        replenish(limits);
        Ok(())
    }

    pub(crate) fn ram(&self) -> Option<&GuestRam> {
        self.ram.as_ref()
    }

    /// Whether clones can map the VM's memory as it is.
    pub(crate) fn memory_can_be_shared(&self) -> bool {
        self.ram.as_ref().is_some_and(GuestRam::can_be_shared)
    }

    /// Detaches the devices: the host writes nothing to guest memory any more.
    pub(crate) fn detach(&mut self) {
        drop(self.attachment.take());
    }

    fn teardown(&mut self) {
        if host::is_forked() {
            // Everything belongs to the parent process, which continues with it.
            return std::mem::forget(self.take());
        }
        self.exit_event.report(Exit::Killed);
        if self.settle() {
            self.detach();
            self.vcpus.clear();
            self.stats.clear();
            drop(self.vm.take());
            drop(self.ram.take());
            self.images.clear();
        } else {
            self.detach();
            teardown_queue().watch(self.take());
        }
    }

    /// Moves all parts that a vCPU thread may still use into a new value.
    fn take(&mut self) -> VmInner {
        VmInner {
            control: Arc::clone(&self.control),
            exit_event: Arc::clone(&self.exit_event),
            exits: Arc::clone(&self.exits),
            console: self.console.clone(),
            vsock: self.vsock.clone(),
            balloon: self.balloon.clone(),
            bus: Arc::clone(&self.bus),
            times: self.times,
            stats: std::mem::take(&mut self.stats),
            hardware: self.hardware,
            watch: Arc::clone(&self.watch),
            vcpus: std::mem::take(&mut self.vcpus),
            attachment: self.attachment.take(),
            vm: self.vm.take(),
            ram: self.ram.take(),
            images: std::mem::take(&mut self.images),
            drop_guards: std::mem::take(&mut self.drop_guards),
        }
    }
}

impl Drop for VmInner {
    fn drop(&mut self) {
        // Otherwise another value owns all parts.
        if self.vm.is_some() {
            self.teardown();
        }
    }
}

impl Teardown for VmInner {
    fn has_stopped(&self, within: Duration) -> bool {
        self.exit_event.report(Exit::Killed);
        self.control.settle(within)
    }

    fn leaks(&mut self) {
        self.drop_guards = DropGuards::default();
    }
}

fn place_images(host: &Host, config: &VmConfig) -> Result<Vec<PlacedImage>, PmemError> {
    let images = config
        .images
        .iter()
        .map(PmemFile::image)
        .collect::<Result<Vec<_>, _>>()?;
    let sizes: Vec<u64> = images.iter().map(PmemImage::bytes).collect();
    let bits = cpuid::address_bits(host.cpuid());
    let addresses = place(config.memory_bytes, &sizes, bits)?;
    Ok(images.into_iter().zip(addresses).collect())
}

/// Returns the pmem images that a saved VM was given, with their addresses.
pub(crate) fn saved_images(state: &VmState) -> Result<Vec<PlacedImage>, BootError> {
    let devices = state.transports.iter().map(|transport| &transport.device);
    let images = devices.filter_map(|device| match device {
        DeviceState::Pmem(saved) => Some(saved),
        _ => None,
    });
    images
        .map(|saved| match &saved.image {
            Some(image) if image.bytes() == saved.bytes => Ok((image.clone(), saved.address)),
            _ => Err(BootError::State(
                "an image that the VM had is not there".into(),
            )),
        })
        .collect()
}

fn device_word(index: u32) -> String {
    let base = layout::MMIO_BASE + u64::from(index) * layout::MMIO_SIZE;
    format!(
        "virtio_mmio.device=4K@{base:#x}:{}",
        layout::FIRST_IRQ + index
    )
}
