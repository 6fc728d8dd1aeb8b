//! A real guest: our kernel with our agent, booted once per test binary and forked for each case.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use hearth_agent::client::{AgentClient, Command, Output, OutputLimits};
use hearth_agent::proto::{AGENT_PORT, InstanceId, READY_PORT, Refresh};
use hearth_images::{Event, Images, Progress};
use hearth_vmm::virtio::vsock::VsockStream;
use hearth_vmm::{CreateTimes, Exit, Template, Vm, VmConfig, VmConfigBuilder};
use tokio::sync::OnceCell;

use crate::skip::within;

/// Environment variable with the path of a kernel to use instead of ours.
const KERNEL_VARIABLE: &str = "HEARTH_KERNEL";
/// Environment variable with the path of an initramfs to use instead of ours.
const INITRAMFS_VARIABLE: &str = "HEARTH_INITRAMFS";

/// Seconds on hardware after which a boot counts as stuck, plus the seconds for each GiB of memory:
/// the kernel initializes the descriptor of each page.
const BOOT_SECONDS: u64 = 18;
const BOOT_SECONDS_PER_GIB: u64 = 8;

/// A running guest and a connection to its agent.
#[derive(Debug)]
pub struct Guest {
    /// The virtual machine.
    pub vm: Vm,
    /// The connection that the agent opened (booted guest) or the harness opened (forked guest).
    pub agent: AgentClient<VsockStream>,
    /// The guest's identity.
    pub instance: InstanceId,
}

/// The phases of a boot.
#[derive(Clone, Copy, Debug)]
pub struct Phases {
    /// The times of the VMM's steps.
    pub create: CreateTimes,
    /// From the first instruction to the agent's `main`, by the guest's clock.
    pub kernel: Duration,
    /// From the first instruction to the agent's greeting, by the guest's clock.
    pub greeted: Duration,
    /// From the first instruction to the first pong, by the host's clock.
    pub pong: Duration,
}

/// Reports on stderr the stage of a first run, which takes minutes.
struct Stages;

impl Progress for Stages {
    fn event(&self, event: Event) {
        if let Event::Begin(stage) = event {
            eprintln!("{}...", stage.label());
        }
    }
}

/// Returns the paths of kernel and initramfs.
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

/// Formats an error with all its causes.
#[must_use]
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Returns the kernel that guests here boot: ours (built if it is not cached), or `$HEARTH_KERNEL`.
#[must_use]
pub fn kernel_path() -> PathBuf {
    files().0.clone()
}

/// Returns a configuration that boots our image; callers may refine it.
pub fn image() -> VmConfigBuilder {
    let (kernel, initramfs) = files();
    VmConfig::builder(kernel).initramfs(initramfs)
}

impl Guest {
    /// Boots a guest, with 128 MiB and one vCPU unless `refine` changes that, and waits for its
    /// first pong.
    ///
    /// # Panics
    /// If it does not come up. The message has the end of its console's text, if it has a console.
    pub async fn boot(refine: impl FnOnce(VmConfigBuilder) -> VmConfigBuilder) -> (Guest, Phases) {
        Self::boot_with(refine(image())).await
    }

    /// As [`Guest::boot`], with another kernel and the default initramfs.
    ///
    /// # Panics
    /// If it does not come up.
    pub async fn boot_from(kernel: VmConfigBuilder) -> (Guest, Phases) {
        Self::boot_with(kernel.initramfs(&files().1)).await
    }

    async fn boot_with(config: VmConfigBuilder) -> (Guest, Phases) {
        let config = config.build().expect("a possible configuration");
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
        let seconds = BOOT_SECONDS + BOOT_SECONDS_PER_GIB * (config.memory_bytes() >> 30);
        let limit = crate::patience(Duration::from_secs(seconds));
        let Ok(stream) = tokio::time::timeout(limit, dialled).await else {
            panic!(
                "the agent did not dial; exits: {:?}\n{}",
                vm.exits(),
                tail(&vm)
            );
        };
        let mut agent = greet(stream).await;
        within(5, "first pong", agent.ping(1))
            .await
            .expect("a pong");
        let hello = agent.hello().unwrap_or_default();
        let phases = Phases {
            create: vm.times(),
            kernel: Duration::from_micros(hello.started_us),
            greeted: Duration::from_micros(hello.greeted_us),
            pong: start.elapsed(),
        };
        let instance = hello.instance;
        (
            Guest {
                vm,
                agent,
                instance,
            },
            phases,
        )
    }

    /// Returns a guest for one case: a clone of a guest that is booted once per test binary.
    ///
    /// # Panics
    /// If the guest cannot be booted or forked.
    pub async fn fork() -> Guest {
        Self::of(Self::template().await).await
    }

    /// Returns the template that [`Guest::fork`] clones: a guest that is booted once per test
    /// binary and has finished its preparations.
    ///
    /// # Panics
    /// If the guest cannot be booted or captured.
    pub async fn template() -> &'static Template {
        static TEMPLATE: OnceCell<Result<Template, ()>> = OnceCell::const_new();
        // A failed boot is not tried again for each case of the binary.
        let make = || async {
            let made = tokio::spawn(async { Self::prepared(|config| config).await.freeze() });
            made.await.map_err(|_| ())
        };
        let template = TEMPLATE.get_or_init(make).await.as_ref();
        template.expect("a guest to fork (why there is none is above)")
    }

    /// Boots a guest and waits until its agent has prepared everything, as for a template.
    ///
    /// # Panics
    /// As [`Guest::boot`].
    pub async fn prepared(refine: impl FnOnce(VmConfigBuilder) -> VmConfigBuilder) -> Guest {
        let (mut guest, phases) = Self::boot(refine).await;
        eprintln!("booted: {phases:?}");
        let mut nonce = 1;
        let prepared = async {
            loop {
                nonce += 1;
                if guest.agent.ping(nonce).await.expect("a pong").prepared {
                    return;
                }
            }
        };
        within(5, "preparation", prepared).await;
        guest
    }

    /// Makes the guest a template, captured when idle if it becomes idle within 5 seconds. Its
    /// connection ends.
    ///
    /// # Panics
    /// If it cannot be captured.
    #[must_use]
    pub fn freeze(self) -> Template {
        drop(self.agent);
        let rested = self.vm.pause_at_rest(Duration::from_secs(5));
        rested.unwrap_or_else(|error| panic!("{}", error_chain(&error)));
        let frozen = self.vm.into_template();
        frozen.unwrap_or_else(|error| panic!("{}", error_chain(&error)))
    }

    /// Forks `template` and refreshes the clone, so that it is unique.
    ///
    /// # Panics
    /// If the clone cannot be forked or refreshed.
    pub async fn of(template: &Template) -> Guest {
        let vm = template.fork();
        Self::refreshed(vm.unwrap_or_else(|error| panic!("{}", error_chain(&error)))).await
    }

    /// Refreshes a running clone, so that it is unique after its restore.
    ///
    /// # Panics
    /// If its agent does not answer.
    pub async fn refreshed(vm: Vm) -> Guest {
        let mut agent = dial_agent(&vm).await;
        let mut identity = InstanceId::default();
        identity.0.copy_from_slice(&random(16));
        let refresh = Refresh {
            entropy: random(64),
            wall_clock: Some(std::time::SystemTime::now().into()),
            instance: Some(identity),
            hostname: None,
        };
        let refreshed = within(5, "refresh", agent.refresh(refresh)).await;
        let refreshed = refreshed.unwrap_or_else(|error| {
            let console = tail(&vm);
            panic!("no answer: {error}; {:?}\n{console}", vm.status())
        });
        assert!(refreshed.all_applied(), "{refreshed:?}");
        Guest {
            vm,
            agent,
            instance: identity,
        }
    }

    /// Opens a new connection to the agent.
    ///
    /// # Panics
    /// If it is not established.
    pub async fn connect(&self) -> AgentClient<VsockStream> {
        dial_agent(&self.vm).await
    }

    /// Runs a program to its end and returns its output.
    ///
    /// # Panics
    /// If it cannot be run.
    pub async fn run(&self, command: Command) -> Output {
        self.run_with(command, &[]).await
    }

    /// Runs a program with this input and returns its output.
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

    /// Waits until the guest ends.
    ///
    /// # Panics
    /// If it does not end.
    pub async fn exit(&self) -> Exit {
        within(6, "end of the guest", self.vm.exited()).await
    }
}

/// Returns the last 40 lines of the guest's console.
fn tail(vm: &Vm) -> String {
    let text = vm.console().text();
    let lines: Vec<&str> = text.lines().rev().take(40).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

async fn greet(stream: VsockStream) -> AgentClient<VsockStream> {
    within(5, "handshake", AgentClient::handshake(stream))
        .await
        .expect("a greeting")
}

/// Opens a connection to the agent of `vm`, which may be a clone that is not yet refreshed.
///
/// # Panics
/// If it is not established.
pub async fn dial_agent(vm: &Vm) -> AgentClient<VsockStream> {
    let limit = crate::patience(Duration::from_secs(5));
    let stream = vm.vsock().connect_timeout(AGENT_PORT, limit).await;
    greet(stream.unwrap_or_else(|error| panic!("{error}; {:?}", vm.exits()))).await
}

/// Returns the guest that the cases of one test binary share. It runs until the process ends. Cases
/// must leave it unchanged.
///
/// # Panics
/// If it does not come up, for each caller.
pub async fn shared() -> &'static Guest {
    static GUEST: OnceCell<Guest> = OnceCell::const_new();
    GUEST.get_or_init(Guest::fork).await
}

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        let rest = bytes.get_mut(filled..).unwrap_or_default();
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(rest, flags).expect("the host has randomness");
    }
    bytes
}

/// Returns bytes without a pattern (xorshift); the same seed gives the same bytes.
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
