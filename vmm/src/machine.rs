//! What a VM owns, how it is made, and how it is taken apart.
//!
//! A [`Machine`] is taken apart in this order: streams end, vCPU threads are stopped and leave it
//! (in bounded time), the event thread lets go, KVM is closed, and only then memory is unmapped. A
//! machine whose vCPU threads do not leave in time is kept whole: nothing is unmapped under them.
//! It is leaked, which is counted and logged, until they do (see [`crate::undertaker`]).

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::board::{Board, SharedTransport};
use crate::boot::{self, LoadError};
use crate::capture::Capture;
use crate::config::{ConfigError, MAX_VCPUS, VmConfig};
use crate::cpu::{cpuid, setup};
use crate::devices::Devices;
use crate::ending::Ending;
use crate::frame::{BASE_DEVICES, Frame, PlacedImage, Wire};
use crate::host::{self, CpuProfile, Host, HostError};
use crate::kvm::KvmError;
use crate::layout;
use crate::legacy::console::Console;
use crate::limits::Limits;
use crate::memory::{GuestRam, MemoryError};
use crate::reactor::{Attachment, Reactor, ReactorError};
use crate::sigbus::{self, Watch};
use crate::snapshot::VmState;
use crate::state::Exit;
use crate::undertaker::{Mortal, STOP_BOUND, undertaker};
use crate::vcpu::gate::{Gate, Want};
use crate::vcpu::runner::{Crew, replenish};
use crate::vcpu::stats::VcpuStats;
use crate::vcpu::{ExitCounters, Vcpu, VcpuError};
use crate::virtio::DeviceState;
use crate::virtio::balloon::Balloon;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::pmem::{PmemError, PmemFile, PmemImage, place};
use crate::virtio::vsock::VsockHost;

/// The guest's vsock address. Every VM has its own socket space, so that one number serves all.
pub const GUEST_CID: u64 = 3;

/// Why a VM could not be made. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The configuration is not possible on this host.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The host cannot run guests.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Guest memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An image file cannot be given to the guest.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// Kernel, initramfs or command line could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A saved state is not one that a VM can have.
    #[error("the saved state cannot be used: {0}")]
    State(String),
    /// A KVM ioctl failed.
    #[error("KVM refused to make the VM")]
    Kvm(#[from] KvmError),
    /// A vCPU thread could not be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The event threads could not be used.
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    /// The host has no file descriptor left.
    #[error("the host has no file descriptor left for a device; raise ulimit -n")]
    Descriptors(#[source] std::io::Error),
}

/// How long the steps of making a VM took.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct CreateTimes {
    /// Kernel and initramfs files read; nothing from the second boot of a configuration on.
    pub image: Duration,
    /// Guest memory made, image mapped into it, boot structures written.
    pub load: Duration,
    /// KVM's VM, memory slots, interrupt controllers, vCPUs and wires of devices.
    pub kvm: Duration,
    /// Devices and threads.
    pub devices: Duration,
}

/// A VM's parts. [`Machine::take_apart`] runs at drop and knows their order; only the last field's
/// place counts.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) gate: Arc<Gate>,
    pub(crate) ending: Arc<Ending>,
    pub(crate) exits: Arc<ExitCounters>,
    pub(crate) console: Console,
    pub(crate) vsock: VsockHost,
    pub(crate) balloon: Balloon,
    pub(crate) board: Arc<Board>,
    pub(crate) times: CreateTimes,
    /// Of the vCPUs, if instructions are counted. Each holds the VM in the kernel.
    pub(crate) stats: Vec<VcpuStats>,
    pub(crate) hardware: Hardware,
    watch: Arc<Watch>,
    /// Until their threads are started.
    vcpus: Vec<VcpuFd>,
    attachment: Option<Attachment>,
    /// Closed after the threads left; vCPU fds are owned by the threads.
    vm: Option<Arc<VmFd>>,
    /// Unmapped last.
    ram: Option<GuestRam>,
    images: Vec<PlacedImage>,
    /// Dropped after everything else.
    pub(crate) baggage: Baggage,
}

/// What a VM keeps for others until nothing of itself is left: until the last clone of this goes.
#[derive(Clone, Default)]
pub(crate) struct Baggage(Arc<Mutex<Vec<Box<dyn Send>>>>);

impl Baggage {
    pub(crate) fn add(&self, piece: Box<dyn Send>) {
        let mut pieces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.push(piece);
    }
}

impl std::fmt::Debug for Baggage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Baggage")
    }
}

/// What a VM is made of, apart from what is in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Hardware {
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u8,
    pub(crate) console: bool,
    pub(crate) pit: bool,
    pub(crate) pmu: bool,
    pub(crate) profile: CpuProfile,
    /// Not in a template's file: nothing that is stored decides it.
    #[serde(skip)]
    pub(crate) limits: Limits,
}

impl Machine {
    /// Makes a VM that boots `config`; its vCPUs wait at the gate.
    pub(crate) fn create(config: &VmConfig) -> Result<Machine, BootError> {
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
        let mut frame = Frame::new(host, hardware, ram, images)?;
        for (index, vcpu) in (0u8..).zip(&frame.vcpus) {
            setup::boot(vcpu, index, frame.ram.map(), &entry)?;
        }
        times.kvm = start.elapsed();

        let start = Instant::now();
        let irq = frame.serial.take();
        let devices = Devices::new(hardware, &frame.images, &frame.wires, irq)?;
        let mut machine = Self::assemble(hardware, frame, devices);
        if config.count_instructions {
            machine.count_instructions();
        }
        times.devices = start.elapsed();
        machine.times = times;
        let crew = Crew::muster(hardware.vcpus, hardware.limits, config.placement.as_ref())?;
        machine.start_surely(crew, Want::Pause)?;
        Ok(machine)
    }

    /// Makes a VM that can go on from `state`, whose memory and images are those of `frame`. Its
    /// devices have their state and sleep; all else is left to [`Machine::restore`].
    pub(crate) fn shell(state: &VmState, mut frame: Frame) -> Result<Machine, BootError> {
        let start = Instant::now();
        if state.vcpus.len() != frame.vcpus.len() {
            return Err(BootError::State("not as many vCPUs as the VM has".into()));
        }
        let irq = frame.serial.take();
        let devices = Devices::restore(state, &frame.images, &frame.wires, irq)?;
        let mut machine = Self::assemble(state.hardware, frame, devices);
        for (transport, saved) in machine.board.virtio.iter().zip(&state.transports) {
            transport
                .lock()
                .restore(saved)
                .map_err(|e| BootError::State(e.to_string()))?;
        }
        machine.times.devices = start.elapsed();
        Ok(machine)
    }

    /// Gives a shell of `state` what is left of it. Its vCPUs have no threads yet, or wait at the
    /// gate.
    pub(crate) fn restore(&mut self, state: &VmState) -> Result<(), BootError> {
        let start = Instant::now();
        let Some(vm) = &self.vm else {
            return Err(BootError::State("the VM was taken apart".into()));
        };
        state.chips.restore(vm)?;
        for (index, saved) in state.vcpus.iter().enumerate() {
            let restore = |vcpu: &VcpuFd| saved.restore(vcpu, index, state.hardware.profile);
            match self.vcpus.get(index) {
                Some(vcpu) => restore(vcpu)?,
                None => self
                    .gate
                    .with_vcpu(index, |vcpu| restore(vcpu))
                    .ok_or_else(|| BootError::State("a vCPU's thread is gone".into()))??,
            }
        }
        self.times.kvm += start.elapsed();
        let start = Instant::now();
        // Now that the controllers can take interrupts.
        for transport in &self.board.virtio {
            transport.lock().begin();
        }
        if let Some(serial) = &self.board.serial {
            serial.begin();
        }
        self.times.devices += start.elapsed();
        Ok(())
    }

    /// Waits until the threads of the vCPUs, if they were started, are at the gate.
    pub(crate) fn settle(&self) -> bool {
        self.gate.settle(STOP_BOUND)
    }

    /// All but the vCPUs' threads and the service of the devices.
    fn assemble(hardware: Hardware, frame: Frame, devices: Devices) -> Machine {
        let Frame {
            vcpus,
            vm,
            wires,
            images,
            ram,
            ..
        } = frame;
        let virtio = devices.virtio.into_iter().zip(wires);
        let virtio = virtio.map(|(device, Wire { bell, interrupt })| {
            SharedTransport::new(MmioTransport::new(device, ram.clone(), bell, interrupt))
        });
        let board = Arc::new(Board {
            serial: devices.serial,
            virtio: virtio.collect(),
            registers: (hardware.profile == CpuProfile::Emulated).then(|| ram.clone()),
        });
        let gate = Arc::new(Gate::new(vcpus.len(), Want::Pause));
        let ending = Arc::new(Ending::new(Arc::clone(&gate), devices.console.clone()));
        ending.ends_streams(devices.vsock.clone());
        Machine {
            hardware,
            watch: Watch::new(ram.clone()),
            gate,
            ending,
            exits: Arc::new(ExitCounters::default()),
            console: devices.console,
            vsock: devices.vsock,
            balloon: devices.balloon,
            board,
            times: CreateTimes::default(),
            stats: Vec::new(),
            vcpus,
            attachment: None,
            vm: Some(Arc::new(vm)),
            ram: Some(ram),
            images,
            baggage: Baggage::default(),
        }
    }

    /// Counts emulated instructions, if the host can; before the start.
    pub(crate) fn count_instructions(&mut self) {
        // A host that does not count is no reason not to run.
        let stats = self.vcpus.iter().map(VcpuStats::open);
        self.stats = stats.filter_map(Result::ok).collect();
    }

    /// Gives the vCPUs to their threads, which wait at the gate, or run at once: to wake a thread
    /// that has just come to wait takes longer than all the rest of a fork on a busy host. Then
    /// has the devices served: what the guest wants of them before is remembered. A failure
    /// takes the half-made machine apart by dropping it; a vCPU that proves unable to run ends
    /// it later.
    pub(crate) fn start(&mut self, crew: Crew, want: Want) -> Result<(), BootError> {
        self.launch(crew, want, None)
    }

    /// The same, and waits until it is known that the vCPUs can run: for as long as KVM takes to
    /// make a thread.
    pub(crate) fn start_surely(&mut self, crew: Crew, want: Want) -> Result<(), BootError> {
        let (begun, vcpus_begun) = mpsc::channel();
        self.launch(crew, want, Some(begun))?;
        let start = Instant::now();
        for vcpu in vcpus_begun {
            vcpu?;
        }
        self.times.devices += start.elapsed();
        Ok(())
    }

    fn launch(
        &mut self,
        mut crew: Crew,
        want: Want,
        begun: Option<Sender<Result<(), VcpuError>>>,
    ) -> Result<(), BootError> {
        let start = Instant::now();
        sigbus::install().map_err(VcpuError::Signal)?;
        // All that the end of a vCPU may need, before there is one.
        let limits = self.hardware.limits;
        undertaker()
            .start()
            .map_err(|e| ReactorError(Box::new(e)))?;
        let reactor = Reactor::get(limits.seccomp)?;
        self.gate.set(want);
        for (index, fd) in std::mem::take(&mut self.vcpus).into_iter().enumerate() {
            let vcpu = Vcpu {
                index,
                fd: Some(fd),
                board: Arc::clone(&self.board),
                gate: Arc::clone(&self.gate),
                ending: Arc::clone(&self.ending),
                exits: Arc::clone(&self.exits),
                begun: begun.clone(),
                watch: Arc::clone(&self.watch),
            };
            crew.next()?.run(vcpu)?;
        }
        let (virtio, ending) = (self.board.virtio.clone(), Arc::clone(&self.ending));
        self.attachment = Some(reactor.attach(virtio, ending, Arc::clone(&self.watch))?);
        self.times.devices += start.elapsed();
        replenish(limits);
        Ok(())
    }

    /// What it is captured from; `None` once it was taken apart.
    pub(crate) fn capture(&self) -> Option<Capture> {
        Some(Capture {
            hardware: self.hardware,
            gate: Arc::clone(&self.gate),
            vm: Arc::clone(self.vm.as_ref()?),
            board: Arc::clone(&self.board),
            ram: self.ram.clone()?,
            _baggage: self.baggage.clone(),
        })
    }

    pub(crate) fn ram(&self) -> Option<&GuestRam> {
        self.ram.as_ref()
    }

    /// Whether clones can have its memory as it is.
    pub(crate) fn memory_can_be_shared(&self) -> bool {
        self.ram.as_ref().is_some_and(GuestRam::can_be_shared)
    }

    /// Ends the service of the devices: nothing of the host writes to guest memory any more.
    pub(crate) fn detach(&mut self) {
        drop(self.attachment.take());
    }

    fn take_apart(&mut self) {
        if host::is_forked() {
            // All of it is the parent's, which goes on with it.
            return std::mem::forget(self.take());
        }
        self.ending.report(Exit::Killed);
        if self.settle() {
            self.detach();
            self.vcpus.clear();
            self.stats.clear();
            drop(self.vm.take());
            drop(self.ram.take());
            self.images.clear();
        } else {
            self.detach();
            undertaker().watch(self.take());
        }
    }

    /// All that must stay as long as a vCPU thread may use it; nothing of that is left here.
    fn take(&mut self) -> Machine {
        Machine {
            gate: Arc::clone(&self.gate),
            ending: Arc::clone(&self.ending),
            exits: Arc::clone(&self.exits),
            console: self.console.clone(),
            vsock: self.vsock.clone(),
            balloon: self.balloon.clone(),
            board: Arc::clone(&self.board),
            times: self.times,
            stats: std::mem::take(&mut self.stats),
            hardware: self.hardware,
            watch: Arc::clone(&self.watch),
            vcpus: std::mem::take(&mut self.vcpus),
            attachment: self.attachment.take(),
            vm: self.vm.take(),
            ram: self.ram.take(),
            images: std::mem::take(&mut self.images),
            baggage: std::mem::take(&mut self.baggage),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Else another value has it all.
        if self.vm.is_some() {
            self.take_apart();
        }
    }
}

impl Mortal for Machine {
    fn has_stopped(&self, within: Duration) -> bool {
        self.ending.report(Exit::Killed);
        self.gate.settle(within)
    }

    fn leaks(&mut self) {
        self.baggage = Baggage::default();
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

/// The images that a saved VM was given, with their addresses.
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
