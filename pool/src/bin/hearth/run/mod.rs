//! `hearth run`: one program in one guest, with this process's streams and the program's exit code.

mod copies;
mod error;
mod report;
mod session;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use hearth_agent::Command;
use hearth_agent::proto::{Input, ROOT_WORD, layer_word};
use hearth_images::Images;
use hearth_vmm::{CpuProfile, Host, VmConfig};

use self::error::RunError;
use self::report::Report;
use crate::failure::chain;
use crate::machine::{Machine, seconds};
use crate::progress;
use crate::signals;
use crate::{FAILED, TIMED_OUT};

/// How long a guest may take to its agent's greeting on hardware; scaled by the CPU profile.
const BOOT_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs one program in a fresh guest
///
/// The guest's program gets this command's stdin, stdout, stderr, and gives its exit code. Ctrl-C and
/// SIGTERM are passed on to the program; the second one ends the guest. The base image holds small
/// built-in programs only: cat echo env exit false id ls pwd sleep true uname. For others give the
/// guest a root file system of yours (--root), or a program (--copy-in).
///
/// The first run builds the guest's kernel, which takes minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Image to boot
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Image::Base)]
    image: Image,
    /// Kernel to boot instead of the image's: an ELF file (vmlinux) or a bzImage with virtio-mmio and vsock
    #[arg(
        long,
        value_name = "PATH",
        env = "HEARTH_KERNEL",
        conflicts_with = "image"
    )]
    kernel: Option<PathBuf>,
    /// Initramfs to boot instead of the image's; its /init must be the agent
    #[arg(long, value_name = "PATH", env = "HEARTH_INITRAMFS")]
    initramfs: Option<PathBuf>,
    /// Root file system of the guest: an EROFS image, as `hearth image build python` or `import` makes it
    #[arg(long, value_name = "PATH")]
    root: Option<PathBuf>,
    /// Lets programs write so many MiB over the files of --root [default: half of the memory]
    #[arg(long, value_name = "MIB", requires = "root")]
    layer: Option<u64>,
    #[command(flatten)]
    machine: Machine,
    /// Shows the guest's serial console on stderr; slows the boot
    #[arg(long)]
    console: bool,
    /// Ends the program after so many seconds (SIGTERM, 2 s later SIGKILL); exit code 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Gives the guest so many seconds to boot [default: 10, or 100 where ring 0 is emulated]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    boot_timeout: Option<Duration>,
    /// Copies a file into the guest before the program runs; may be repeated
    #[arg(long, value_name = "HOST:GUEST", value_parser = copies::inward)]
    copy_in: Vec<copies::Copy>,
    /// Copies a file out of the guest when the program has ended, however; may be repeated
    #[arg(long, value_name = "GUEST:HOST", value_parser = copies::outward)]
    copy_out: Vec<copies::Copy>,
    /// Prints one line of JSON to stderr, after all else, with the time of each phase in microseconds
    #[arg(long)]
    json: bool,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "ARGV")]
    argv: Vec<OsString>,
}

const EXIT_CODES: &str = "\
Exit codes:
  that of the program; 128 and the signal's number if a signal ended it
  124  --timeout ended the program
  125  the program's end is not known: the guest did not start, or ended before it; a file could not
       be copied; or wrong usage
  126  the guest has the program, but cannot execute it
  127  the guest has no such program
  129, 130, 143  the guest was ended by SIGHUP, Ctrl-C, SIGTERM

Phases (--json, phases_us): host_probe, once per process, then image (found or built, read), create
(up to the first KVM_RUN), boot (to the start of the agent), agent_ready (to its greeting on the host),
copy_in, exec (request to exit status), copy_out.";

/// Images that hold an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Image {
    /// Our kernel, and an initramfs that holds nothing but the agent and its built-in programs
    Base,
}

pub(crate) fn run(args: &Args) -> ExitCode {
    let mut report = Report::default();
    let result = guest(args, &mut report);
    let code = match &result {
        Ok(exited) if exited.timed_out => TIMED_OUT,
        Ok(exited) => exited.status.shell_code(),
        Err(RunError::Signal(signal)) => signals::exit_code(*signal),
        Err(RunError::Exec(error)) => error::exec_code(error),
        Err(_) => FAILED,
    };
    if let Err(error) = &result {
        let text = chain(error);
        eprintln!("hearth: {text}");
        report.error = Some(text);
    }
    if args.json {
        report.exit_code = code;
        eprintln!("{}", report.line());
    }
    ExitCode::from(code)
}

fn guest(args: &Args, report: &mut Report) -> Result<hearth_agent::proto::Exited, RunError> {
    let start = Instant::now();
    let host = Host::get()?;
    report.phases_us.host_probe = Some(report::micros(start.elapsed()));
    report.profile = Some(host.profile());

    let start = Instant::now();
    let config = config(args)?;
    config.preload()?;
    report.phases_us.image = Some(report::micros(start.elapsed()));

    let plan = session::Plan {
        config,
        command: command(args)?,
        timeout: args.timeout,
        boot_timeout: args.boot_timeout.unwrap_or(boot_timeout(host.profile())),
        show_console: args.console,
        copy_in: args.copy_in.clone(),
        copy_out: args.copy_out.clone(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    let result = runtime.block_on(session::session(plan, report));
    // A read of stdin that nobody waits for any more must not hold the exit up.
    runtime.shutdown_background();
    result
}

fn boot_timeout(profile: CpuProfile) -> Duration {
    BOOT_TIMEOUT.saturating_mul(profile.timeout_factor())
}

fn config(args: &Args) -> Result<VmConfig, RunError> {
    // Impossible values are refused before minutes go into an image.
    args.machine.apply(VmConfig::builder("")).build()?;
    let (kernel, initramfs) = image(args)?;
    let config = VmConfig::builder(kernel).initramfs(initramfs);
    let config = args.machine.apply(config).console(args.console);
    let config = match &args.root {
        Some(root) => config.pmem(root).append(ROOT_WORD),
        None => config,
    };
    let config = match args.layer {
        Some(mib) => config.append(&layer_word(mib)),
        None => config,
    };
    Ok(config.count_instructions(args.json).build()?)
}

/// Kernel and initramfs; only what the user does not bring is found or built.
fn image(args: &Args) -> Result<(PathBuf, PathBuf), RunError> {
    let Image::Base = args.image;
    let build = || {
        let images = Images::open(None)?;
        Ok::<_, RunError>((images, progress::on_stderr()))
    };
    Ok(match (&args.kernel, &args.initramfs) {
        (Some(kernel), Some(initramfs)) => (kernel.clone(), initramfs.clone()),
        (None, Some(initramfs)) => {
            let (images, progress) = build()?;
            (images.kernel(progress.as_ref())?, initramfs.clone())
        }
        (Some(kernel), None) => {
            let (images, progress) = build()?;
            let guest = images.with_kernel(kernel, progress.as_ref())?;
            (guest.kernel, guest.initramfs)
        }
        (None, None) => {
            let (images, progress) = build()?;
            let guest = images.base(progress.as_ref())?;
            (guest.kernel, guest.initramfs)
        }
    })
}

fn command(args: &Args) -> Result<Command, RunError> {
    let (program, rest) = args.argv.split_first().ok_or(RunError::NoProgram)?;
    let mut command = Command::new(program).args(rest).stdin(Input::Pipe);
    if let Some(timeout) = args.timeout {
        command = command.timeout(timeout);
    }
    Ok(command)
}
