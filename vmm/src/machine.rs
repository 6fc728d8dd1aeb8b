//! What a VM owns, how it is made, and how it is taken apart.
//!
//! A [`Machine`] is taken apart in this order: streams end, vCPU threads are stopped and joined (in
//! bounded time), the event thread lets go, KVM is closed, and only then memory is unmapped. A vCPU
//! thread that does not stop in time keeps its own references to all it uses: it and its memory
//! leak, are counted and logged, and nothing is unmapped under it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use crate::board::{Board, SharedTransport};
use crate::boot::{self, LoadError};
use crate::config::{ConfigError, MAX_VCPUS, VmConfig};
use crate::cpu::{cpuid, setup};
use crate::ending::Ending;
use crate::host::{CpuProfile, Host, HostError};
use crate::kvm::{self, KvmError};
use crate::layout;
use crate::legacy::console::Console;
use crate::legacy::serial::SerialPort;
use crate::memory::{GuestRam, MemoryError};
use crate::reactor::{Attachment, Reactor, ReactorError};
use crate::state::Exit;
use crate::vcpu::gate::{Gate, Want};
use crate::vcpu::{ExitCounters, Vcpu, VcpuError};
use crate::virtio::balloon::{Balloon, BalloonDevice};
use crate::virtio::mmio::{MmioTransport, register};
use crate::virtio::vsock::{VsockDevice, VsockHost};
use crate::virtio::{Bell, Interrupt, VirtioDevice};

/// The guest's vsock address. Every VM has its own socket space, so that one number serves all.
pub const GUEST_CID: u64 = 3;
/// How long a stopping vCPU thread may take before it is leaked.
const STOP_BOUND: Duration = Duration::from_secs(5);

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
    /// Kernel, initramfs or command line could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
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
    /// KVM's VM, memory slots, interrupt controllers and vCPUs.
    pub kvm: Duration,
    /// Devices and threads.
    pub devices: Duration,
}

/// A VM's parts. Field order is irrelevant: [`Machine::take_apart`] runs at drop and knows the order.
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
    pub(crate) profile: CpuProfile,
    threads: Vec<JoinHandle<()>>,
    attachment: Option<Attachment>,
    /// Closed after the threads are gone; vCPU fds are owned by the threads.
    vm: Option<VmFd>,
    /// Unmapped last.
    ram: Option<GuestRam>,
}

impl Machine {
    /// Makes a VM whose vCPUs wait at the gate (`Want::Pause`).
    pub(crate) fn create(config: &VmConfig) -> Result<Machine, BootError> {
        let host = Host::get()?;
        config.check_vcpus(
            u8::try_from(host.max_vcpus())
                .unwrap_or(u8::MAX)
                .min(MAX_VCPUS),
        )?;
        let profile = config.profile.unwrap_or(host.profile());
        let reactor = Reactor::get()?;

        let start = Instant::now();
        config.preload()?;
        let image = start.elapsed();

        let start = Instant::now();
        let mut ram = GuestRam::new(config.memory_bytes)?;
        let devices: Vec<String> = (0..DEVICES).map(device_word).collect();
        let words = config.cmdline(profile, &devices);
        let source = boot::Source {
            payload: &config.payload,
            words: &words,
            vcpus: config.vcpus,
            entry: config.entry,
        };
        let entry = boot::load(&mut ram, &source)?;
        let load = start.elapsed();

        let start = Instant::now();
        let vm = kvm::create_vm(host.kvm())?;
        kvm::set_memory(&vm, &ram)?;
        kvm::create_irqchip(&vm, config.pit)?;
        let mut fds = Vec::with_capacity(usize::from(config.vcpus));
        for index in 0..config.vcpus {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(KvmError::of("KVM_CREATE_VCPU"))?;
            let cpuid =
                cpuid::for_vcpu(host.cpuid(), profile, index, config.vcpus).map_err(|_| {
                    KvmError {
                        call: "KVM_SET_CPUID2",
                        source: std::io::ErrorKind::InvalidInput.into(),
                    }
                })?;
            fd.set_cpuid2(&cpuid)
                .map_err(KvmError::of("KVM_SET_CPUID2"))?;
            setup::boot(&fd, index, ram.map(), &entry)?;
            fds.push(fd);
        }
        let kvm_time = start.elapsed();

        let start = Instant::now();
        let memory_mib = u32::try_from(config.memory_bytes >> 20).unwrap_or(u32::MAX);
        let vsock_bell = Bell::new().map_err(BootError::Descriptors)?;
        let (vsock_device, vsock) = VsockDevice::new(GUEST_CID, vsock_bell.clone());
        let balloon_bell = Bell::new().map_err(BootError::Descriptors)?;
        let (balloon_device, balloon) = BalloonDevice::new(memory_mib, balloon_bell.clone());
        let transports = vec![
            attach_device(&vm, &ram, 0, Box::new(vsock_device), vsock_bell)?,
            attach_device(&vm, &ram, 1, Box::new(balloon_device), balloon_bell)?,
        ];
        let console = Console::default();
        let serial = if config.console {
            let (port, irq) = SerialPort::new(console.clone()).map_err(BootError::Descriptors)?;
            vm.register_irqfd(&irq, layout::SERIAL_IRQ)
                .map_err(KvmError::of("KVM_IRQFD"))?;
            Some(port)
        } else {
            None
        };
        let board = Arc::new(Board {
            serial,
            virtio: transports.clone(),
        });
        let gate = Arc::new(Gate::new(fds.len(), Want::Pause));
        let ending = Arc::new(Ending::new(Arc::clone(&gate), console.clone()));
        ending.ends_streams(vsock.clone());
        let attachment = reactor.attach(transports, Arc::clone(&ending))?;
        let exits = Arc::new(ExitCounters::default());
        // From here on a failure takes the half-made machine apart by dropping it.
        let mut machine = Machine {
            gate,
            ending,
            exits,
            console,
            vsock,
            balloon,
            board,
            times: CreateTimes::default(),
            profile,
            threads: Vec::with_capacity(fds.len()),
            attachment: Some(attachment),
            vm: Some(vm),
            ram: Some(ram),
        };
        for (index, fd) in fds.into_iter().enumerate() {
            let vcpu = Vcpu {
                index,
                fd,
                board: Arc::clone(&machine.board),
                gate: Arc::clone(&machine.gate),
                ending: Arc::clone(&machine.ending),
                exits: Arc::clone(&machine.exits),
            };
            machine.threads.push(vcpu.spawn()?);
        }
        machine.times = CreateTimes {
            image,
            load,
            kvm: kvm_time,
            devices: start.elapsed(),
        };
        Ok(machine)
    }

    fn take_apart(&mut self) {
        self.ending.report(Exit::Killed);
        let stopped = self.gate.settle(Instant::now() + STOP_BOUND);
        if stopped {
            for thread in self.threads.drain(..) {
                // The thread has left the gate: all that is left of it is its return.
                let _ = thread.join();
            }
        }
        drop(self.attachment.take());
        if stopped {
            drop(self.vm.take());
            drop(self.ram.take());
        } else {
            LEAKED.fetch_add(1, Ordering::Relaxed);
            tracing::error!(
                "a vCPU thread did not stop in {STOP_BOUND:?}: it and its memory are leaked"
            );
            std::mem::forget((self.vm.take(), self.ram.take()));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.take_apart();
    }
}

static LEAKED: AtomicU64 = AtomicU64::new(0);

/// VMs of this process whose vCPU thread could not be stopped and whose memory was therefore left
/// mapped. Anything but zero is a fault of the host's kernel or of this library.
#[must_use]
pub fn leaked_vms() -> u64 {
    LEAKED.load(Ordering::Relaxed)
}

/// Virtio devices of every VM, in the order of their windows: vsock, balloon.
const DEVICES: u32 = 2;

fn device_word(index: u32) -> String {
    let base = layout::MMIO_BASE + u64::from(index) * layout::MMIO_SIZE;
    format!(
        "virtio_mmio.device=4K@{base:#x}:{}",
        layout::FIRST_IRQ + index
    )
}

fn attach_device(
    vm: &VmFd,
    ram: &GuestRam,
    index: u32,
    device: Box<dyn VirtioDevice>,
    bell: Bell,
) -> Result<SharedTransport, BootError> {
    let interrupt = Interrupt::new().map_err(BootError::Descriptors)?;
    let base = layout::MMIO_BASE + u64::from(index) * layout::MMIO_SIZE;
    vm.register_irqfd(interrupt.fd(), layout::FIRST_IRQ + index)
        .map_err(KvmError::of("KVM_IRQFD"))?;
    // One bell for all queues of a device: any value written to QueueNotify rings it.
    let notify = IoEventAddress::Mmio(base + register::QUEUE_NOTIFY);
    vm.register_ioevent(bell.fd(), &notify, NoDatamatch)
        .map_err(KvmError::of("KVM_IOEVENTFD"))?;
    Ok(Arc::new(Mutex::new(MmioTransport::new(
        device,
        ram.clone(),
        bell,
        interrupt,
    ))))
}

/// Takes machines apart off their owners' threads: one thread per process, started with the first.
pub(crate) struct Undertaker(mpsc::Sender<Machine>);

impl Undertaker {
    /// Hands a machine over; if there is no thread for it, it is taken apart here.
    pub(crate) fn bury(machine: Machine) {
        static UNDERTAKER: OnceLock<Option<Undertaker>> = OnceLock::new();
        match UNDERTAKER.get_or_init(Undertaker::start) {
            // A machine that comes back is dropped, and so taken apart, right here.
            Some(undertaker) => drop(undertaker.0.send(machine)),
            None => drop(machine),
        }
    }

    fn start() -> Option<Undertaker> {
        let (sender, machines) = mpsc::channel::<Machine>();
        std::thread::Builder::new()
            .name("hearth-undertaker".into())
            .stack_size(256 << 10)
            .spawn(move || machines.into_iter().for_each(drop))
            .ok()?;
        Some(Undertaker(sender))
    }
}
