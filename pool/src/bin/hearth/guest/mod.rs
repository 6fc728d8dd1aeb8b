//! Runs one program in one guest, for several subcommands: the guest's configuration, and the exit
//! code for its end.

mod copies;
mod error;
mod image;
mod report;
mod session;
pub(crate) mod terminal;
mod trees;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hearth_agent::Command;
use hearth_agent::proto::{Account, Exited, ROOT_WORD, layer_word};
use hearth_images::Images;
use hearth_vmm::{Host, VmConfig};

pub(crate) use self::error::RunError;
pub(crate) use self::image::{Image, image as image_by_name};
pub(crate) use self::report::Report;
use crate::machine::{Machine, seconds};
use crate::progress;
use crate::runtime;
use crate::signals;
use crate::{FAILED, TIMED_OUT};

/// The guest.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Image of the guest: base, which holds nothing but the agent and its built-in programs; or a
    /// root file system on top, by the name of its recipe (python, javascript, shell) or the
    /// recipe's path [default: base, or what the language needs]
    #[arg(long, value_name = "NAME", value_parser = image::image)]
    image: Option<Image>,
    /// Adds a Python package to the image; may be repeated
    #[arg(long, value_name = "NAME[==VERSION]")]
    package: Vec<String>,
    /// Kernel to boot instead of the image's: an ELF file (vmlinux) or a bzImage with virtio-mmio
    /// and vsock
    #[arg(long, value_name = "PATH", env = "HEARTH_KERNEL")]
    kernel: Option<PathBuf>,
    /// Initramfs to boot instead of the image's; its /init must be the agent
    #[arg(long, value_name = "PATH", env = "HEARTH_INITRAMFS")]
    initramfs: Option<PathBuf>,
    /// Root file system of the guest: an EROFS image, as `hearth image build python` or `import`
    /// makes it
    #[arg(long, value_name = "PATH", conflicts_with_all = ["image", "package"])]
    root: Option<PathBuf>,
    /// Lets programs write so many MiB over the files of the root file system [default: 60 % of
    /// the memory]
    #[arg(long, value_name = "MIB")]
    layer: Option<u64>,
    #[command(flatten)]
    machine: Machine,
    /// User of the guest to run the program as [default: `user` if the root file system has one,
    /// else root]
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Shows the guest's serial console on stderr; slows the boot
    #[arg(long)]
    console: bool,
    /// Gives the guest so many seconds to boot [default: 10, or 100 where ring 0 is emulated]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    boot_timeout: Option<Duration>,
    /// Copies a file or directory into the guest before the program runs, for the program's user;
    /// may be repeated
    #[arg(long, value_name = "HOST:GUEST", value_parser = copies::inward)]
    copy_in: Vec<copies::Copy>,
    /// Copies a file or directory out of the guest when the program has ended, however; may be
    /// repeated
    #[arg(long, value_name = "GUEST:HOST", value_parser = copies::outward)]
    copy_out: Vec<copies::Copy>,
}

/// The program to run in the guest, and how.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) command: Command,
    /// Code that the command expects in the guest.
    pub(crate) code: Option<Code>,
    /// The name of the image that it needs; `None` if any will do.
    pub(crate) image: Option<&'static str>,
    pub(crate) timeout: Option<Duration>,
    /// Runs on this process's terminal, instead of on its streams.
    pub(crate) on_terminal: bool,
    /// Counts the guest's instructions where the host can, which costs a little.
    pub(crate) count_instructions: bool,
}

/// Code, and the interpreter that runs it.
#[derive(Debug)]
pub(crate) struct Code {
    pub(crate) place: PathBuf,
    pub(crate) content: Vec<u8>,
    pub(crate) interpreter: &'static str,
    /// An image that has the interpreter.
    pub(crate) image: &'static str,
}

impl Options {
    /// Whether the guest has nothing but the agent's built-in programs.
    pub(crate) fn is_bare(&self) -> bool {
        let root = matches!(self.image, Some(Image::Root(_))) || self.root.is_some();
        !root && self.initramfs.is_none()
    }

    /// The user that the program runs as, and that owns the files that are copied in.
    fn account(&self) -> Account {
        match &self.user {
            Some(name) => Account::Name(name.clone().into_bytes().into()),
            None => Account::Usual,
        }
    }

    fn config(&self, job: &Job) -> Result<VmConfig, RunError> {
        let image = match (&self.image, job.image) {
            (Some(image), _) => image.clone(),
            (None, Some(needed)) if self.is_bare() => image::image(needed)?,
            (None, _) => Image::Base,
        };
        let memory_mib = image.memory_mib();
        // Impossible values are refused before an image is built, which takes minutes.
        let machine = |config| self.machine.apply(config, memory_mib);
        machine(VmConfig::builder("")).build()?;
        self.machine.fits(memory_mib)?;
        if image == Image::Base && !self.package.is_empty() {
            return Err(RunError::NoPackages);
        }
        if image == Image::Base && self.root.is_none() && self.layer.is_some() {
            return Err(RunError::NoRoot);
        }
        let (kernel, initramfs) = self.boot_files()?;
        let root = match &self.root {
            Some(root) => Some(root.clone()),
            None => image.root(&self.package)?,
        };
        let config = VmConfig::builder(kernel).initramfs(initramfs);
        let config = machine(config).console(self.console);
        let config = match root {
            Some(root) => config.pmem(root).append(ROOT_WORD),
            None => config,
        };
        let config = match self.layer {
            Some(mib) => config.append(&layer_word(mib)),
            None => config,
        };
        Ok(config.count_instructions(job.count_instructions).build()?)
    }

    /// Returns kernel and initramfs; only those that the user does not give are found or built.
    fn boot_files(&self) -> Result<(PathBuf, PathBuf), RunError> {
        let build = || {
            let images = Images::open(None)?;
            Ok::<_, RunError>((images, progress::on_stderr()))
        };
        Ok(match (&self.kernel, &self.initramfs) {
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
}

/// Runs the program in a fresh guest.
pub(crate) fn run(
    options: &Options,
    mut job: Job,
    report: &mut Report,
) -> Result<Exited, RunError> {
    job.command = job.command.account(options.account());
    let start = Instant::now();
    let host = Host::get()?;
    report.phases_us.host_probe = Some(report::micros(start.elapsed()));
    report.profile = Some(host.profile());

    let start = Instant::now();
    let config = options.config(&job)?;
    config.preload()?;
    report.phases_us.image = Some(report::micros(start.elapsed()));

    let plan = session::Plan {
        config,
        job,
        slowness: host.timeout_factor(),
        boot_timeout: options.boot_timeout,
        show_console: options.console,
        owner: options.account(),
        copy_in: options.copy_in.clone(),
        copy_out: options.copy_out.clone(),
    };
    let runtime = runtime::on_this_thread()?;
    let result = runtime.block_on(session::session(plan, report));
    // A pending read of stdin must not delay the exit.
    runtime.shutdown_background();
    result
}

/// Returns the exit code for a program's end, or for the reason why it is not known.
pub(crate) fn exit_code(result: &Result<Exited, RunError>) -> u8 {
    match result {
        Ok(exited) if exited.timed_out => TIMED_OUT,
        Ok(exited) => exited.status.shell_code(),
        Err(RunError::Signal(signal)) => signals::exit_code(*signal),
        Err(RunError::Exec(error)) => error::exec_code(error),
        Err(RunError::NoShell | RunError::NoInterpreter { .. }) => error::NOT_FOUND,
        Err(_) => FAILED,
    }
}
