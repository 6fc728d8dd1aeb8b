//! `hearth boot`: boots any guest, with or without the agent, and says how it ended.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use hearth_vmm::{BootError, ConfigError, DEFAULT_MEMORY_MIB, EntryChoice, Exit, Vm, VmConfig};

use crate::TIMED_OUT;
use crate::console;
use crate::failure::failed;
use crate::machine::{DoesNotFit, Machine, seconds};
use crate::runtime::{self, RuntimeError};
use crate::signals::{self, Signals};

/// Boots any kernel, with its serial console on stdout, and says at the end how the guest ended
///
/// The guest gets all of Hearth's devices and need not know any of them; no agent is needed. At the
/// end a line on stderr says how it ended, and so does the exit code.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Kernel to boot: an ELF file (vmlinux) or a bzImage
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    /// Initramfs; uncompressed cpio is fastest
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,
    /// Words to add to the end of the kernel's command line
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    append: Option<String>,
    #[command(flatten)]
    machine: Machine,
    /// Ends the guest after so many seconds; without it, only the guest or Ctrl-C does
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = Entry::Auto)]
    entry: Entry,
}

const EXIT_CODES: &str = "\
Exit codes:
    0  the guest powered off or rebooted
   10  the guest's kernel halted without powering off
   11  the guest's kernel panicked (a stock kernel's panic looks like a reboot)
   12  the processor shut down after a triple fault
   13  KVM could not go on (internal error), mostly an instruction that it cannot emulate
   14  the monitor failed
  124  --timeout was over
  125  the guest could not be started, or wrong usage
  129, 130, 143  ended by SIGHUP, Ctrl-C, SIGTERM";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Entry {
    /// As the kernel file says
    Auto,
    /// The Linux 64-bit boot protocol
    Linux64,
    /// The PVH boot protocol; the kernel needs a PVH note
    Pvh,
}

/// The guest was not booted, or not watched to its end.
#[derive(Debug, thiserror::Error)]
enum GuestError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Memory(#[from] DoesNotFit),
    #[error("the guest could not be started")]
    Boot(#[from] BootError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    #[error("cannot write the guest's console to stdout")]
    Stdout(#[source] std::io::Error),
}

/// The event that ended the guest.
enum End {
    Guest(Exit),
    TimedOut(Duration),
    Signal(u8),
}

pub(crate) fn boot(args: &Args) -> ExitCode {
    match guest(args) {
        Ok(end) => {
            eprintln!("hearth: {}", end.text());
            ExitCode::from(end.exit_code())
        }
        Err(error) => failed(&error),
    }
}

fn guest(args: &Args) -> Result<End, GuestError> {
    let config = config(args)?;
    args.machine.fits(DEFAULT_MEMORY_MIB)?;
    runtime::on_this_thread()?.block_on(async {
        let mut signals = Signals::catch().map_err(GuestError::Signals)?;
        let vm = Vm::boot(&config)?;
        let mut shown = std::pin::pin!(console::show(vm.console(), tokio::io::stdout()));
        let timeout = async {
            match args.timeout {
                Some(time) => {
                    tokio::time::sleep(time).await;
                    time
                }
                None => std::future::pending().await,
            }
        };
        let end = tokio::select! {
            // The console ends with the guest: first show all its output, then how it ended.
            result = &mut shown => {
                result.map_err(GuestError::Stdout)?;
                return Ok(End::Guest(vm.exited().await));
            }
            time = timeout => End::TimedOut(time),
            signal = signals.next() => End::Signal(signal),
        };
        vm.kill();
        shown.await.map_err(GuestError::Stdout)?;
        Ok(end)
    })
}

fn config(args: &Args) -> Result<VmConfig, ConfigError> {
    let config = VmConfig::builder(&args.kernel);
    let mut config = args
        .machine
        .apply(config, DEFAULT_MEMORY_MIB)
        .console(true)
        // A guest without KVM support has no other timer.
        .pit(true)
        .entry(match args.entry {
            Entry::Auto => EntryChoice::Auto,
            Entry::Linux64 => EntryChoice::Linux64,
            Entry::Pvh => EntryChoice::Pvh,
        });
    if let Some(initramfs) = &args.initramfs {
        config = config.initramfs(initramfs);
    }
    if let Some(words) = &args.append {
        config = config.append(words);
    }
    config.build()
}

impl End {
    fn text(&self) -> String {
        match self {
            Self::Guest(exit) => exit.to_string(),
            Self::TimedOut(time) => format!("the guest was ended after --timeout {time:?}"),
            Self::Signal(signal) => format!("the guest was ended by signal {signal}"),
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Guest(exit) => match exit {
                Exit::PowerOff | Exit::Reboot => 0,
                Exit::Halt => 10,
                Exit::Panic => 11,
                Exit::TripleFault => 12,
                Exit::InternalError(_) => 13,
                Exit::Killed | Exit::BusError | Exit::NoThread | Exit::Failed(_) => 14,
            },
            Self::TimedOut(_) => TIMED_OUT,
            Self::Signal(signal) => signals::exit_code(*signal),
        }
    }
}
