//! A real guest: our kernel with our agent, up to its first pong.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hearth_agent::client::{AgentClient, Command, Output, OutputLimits, Pong};
use hearth_agent::proto::{AGENT_PORT, InstanceId, READY_PORT};
use hearth_images::{Event, Images, Progress};
use hearth_vmm::virtio::vsock::VsockStream;
use hearth_vmm::{CreateTimes, Exit, Vm, VmConfig, VmConfigBuilder};
use tokio::sync::OnceCell;

use crate::skip::within;

/// Environment variable that names a kernel to use instead of ours.
const KERNEL_VARIABLE: &str = "HEARTH_KERNEL";
/// Environment variable that names an initramfs to use instead of ours.
const INITRAMFS_VARIABLE: &str = "HEARTH_INITRAMFS";

/// Seconds on hardware after which a boot counts as stuck.
const BOOT_SECONDS: u64 = 18;

/// A running guest and the connection that its agent dialled.
#[derive(Debug)]
pub struct Guest {
    /// The virtual machine.
    pub vm: Vm,
    /// The agent's own connection, after its first pong.
    pub agent: AgentClient<VsockStream>,
    /// The guest's identity.
    pub instance: InstanceId,
    /// How long the boot took.
    pub phases: Phases,
    /// The first pong.
    pub pong: Pong,
}

/// Where the time of a boot went.
#[derive(Clone, Copy, Debug)]
pub struct Phases {
    /// The monitor's steps.
    pub create: CreateTimes,
    /// From the first instruction to the agent's `main`, by the guest's clock.
    pub kernel: Duration,
    /// From the first instruction to the agent's greeting, by the guest's clock.
    pub greeted: Duration,
    /// From the first instruction to the first pong, by the host's clock.
    pub pong: Duration,
}

/// Says on stderr what a first run is doing for minutes.
struct Stages;

impl Progress for Stages {
    fn event(&self, event: Event) {
        if let Event::Begin(stage) = event {
            eprintln!("{}...", stage.label());
        }
    }
}

/// Kernel and initramfs.
fn files() -> &'static (PathBuf, PathBuf) {
    static FILES: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    FILES.get_or_init(|| {
        let named = |variable| std::env::var_os(variable).map(PathBuf::from);
        let (kernel, initramfs) = (named(KERNEL_VARIABLE), named(INITRAMFS_VARIABLE));
        if let (Some(kernel), Some(initramfs)) = (&kernel, &initramfs) {
            return (kernel.clone(), initramfs.clone());
        }
        let images = Images::open(None).expect("an image cache");
        let image = match kernel {
            Some(kernel) => images.with_kernel(&kernel, &Stages),
            None => images.base(&Stages),
        };
        let image = image.unwrap_or_else(|error| panic!("no guest image: {}", error_chain(&error)));
        (image.kernel, initramfs.unwrap_or(image.initramfs))
    })
}

/// An error with all its causes.
#[must_use]
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The kernel that guests here boot: ours (built if it is not cached), or `$HEARTH_KERNEL`.
#[must_use]
pub fn kernel_path() -> PathBuf {
    files().0.clone()
}

/// A configuration that boots our image, to be refined.
pub fn image() -> VmConfigBuilder {
    let (kernel, initramfs) = files();
    VmConfig::builder(kernel).initramfs(initramfs)
}

impl Guest {
    /// Boots a guest of 128 MiB with one vCPU.
    ///
    /// # Panics
    /// If it does not come up.
    pub async fn boot() -> Guest {
        Self::boot_with(|config| config).await
    }

    /// Boots a guest with a refined configuration.
    ///
    /// # Panics
    /// If it does not come up; with its console's end if it has one.
    pub async fn boot_with(refine: impl FnOnce(VmConfigBuilder) -> VmConfigBuilder) -> Guest {
        let config = refine(image()).build().expect("a possible configuration");
        let vm = Vm::create(&config).unwrap_or_else(|error| panic!("{}", error_chain(&error)));
        let mut listener = vm.vsock().listen(READY_PORT).expect("a free port");
        let start = Instant::now();
        vm.resume().expect("a VM that can start");
        let dialled = async {
            tokio::select! {
                stream = listener.accept() => stream.expect("a VM that runs"),
                exit = vm.exited() => panic!("the guest ended while it booted: {exit}\n{}", tail(&vm)),
            }
        };
        let Ok(stream) =
            tokio::time::timeout(crate::patience(Duration::from_secs(BOOT_SECONDS)), dialled).await
        else {
            panic!(
                "the agent did not dial; exits: {:?}\n{}",
                vm.exits(),
                tail(&vm)
            );
        };
        let mut agent = within(5, "handshake", AgentClient::handshake(stream))
            .await
            .expect("a greeting");
        let pong = within(5, "first pong", agent.ping(1))
            .await
            .expect("a pong");
        let hello = *agent.hello();
        Guest {
            phases: Phases {
                create: vm.times(),
                kernel: Duration::from_micros(hello.started_us),
                greeted: Duration::from_micros(hello.greeted_us),
                pong: start.elapsed(),
            },
            instance: hello.instance,
            vm,
            agent,
            pong,
        }
    }

    /// A new connection to the agent.
    ///
    /// # Panics
    /// If it is not established.
    pub async fn connect(&self) -> AgentClient<VsockStream> {
        let stream = within(5, "connect", self.vm.vsock().connect(AGENT_PORT))
            .await
            .expect("the agent listens");
        within(5, "handshake", AgentClient::handshake(stream))
            .await
            .expect("a greeting")
    }

    /// Runs a program to its end and keeps its output.
    ///
    /// # Panics
    /// If it cannot be run.
    pub async fn run(&self, command: Command) -> Output {
        self.run_with(command, &[]).await
    }

    /// Runs a program with this input.
    ///
    /// # Panics
    /// If it cannot be run.
    pub async fn run_with(&self, command: Command, input: &[u8]) -> Output {
        let exec = within(6, "start of a program", self.connect().await.exec(command))
            .await
            .expect("a program that starts");
        let end = exec.output_with(input, OutputLimits::default());
        within(30, "end of a program", end)
            .await
            .expect("a program that ends")
    }

    /// Waits for the guest's end.
    ///
    /// # Panics
    /// If it does not end.
    pub async fn exit(&self) -> Exit {
        within(6, "end of the guest", self.vm.exited()).await
    }
}

/// The end of what the guest printed.
fn tail(vm: &Vm) -> String {
    let text = vm.console().text();
    let lines: Vec<&str> = text.lines().rev().take(40).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// The guest that the cases of one test binary share: booted at the first call, running until the
/// process ends. Cases must leave it as they found it.
///
/// # Panics
/// If it does not come up, for each caller.
pub async fn shared() -> &'static Guest {
    static GUEST: OnceCell<Result<Guest, ()>> = OnceCell::const_new();
    let boot = async {
        // A boot that fails is not tried again by every case of the binary.
        tokio::spawn(Guest::boot()).await.map_err(|_| ())
    };
    GUEST
        .get_or_init(|| boot)
        .await
        .as_ref()
        .expect("the shared guest came up (its own panic is above)")
}

/// Bytes without a pattern (xorshift), the same for the same seed.
#[must_use]
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(len).collect()
}
