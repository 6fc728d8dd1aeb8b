//! The command-line arguments.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hearth_bench::peer::Peers;
use hearth_bench::sweep::{Key, Sweep};
use hearth_images::{Images, ImagesError, Silent};
use hearth_pool::Language;

/// Measures what Hearth's steps cost on this machine, beside the bare ioctls that they consist of.
///
/// Close other programs first: figures from a busy machine say little. Ratios come with a 95 %
/// confidence interval, and are refused when too few samples stand behind them.
#[derive(Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) scenario: Scenario,
    /// Print JSON with all samples instead of the table.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// End with exit code 1 if a figure misses its target, or was not measured.
    #[arg(long, global = true)]
    pub(crate) check: bool,
    /// Run the scenario at several sizes, and fit how its cost grows: memory=MIB,... vcpus=N,...
    /// or guests=N,...
    #[arg(long, global = true, value_name = "KEY=VALUES")]
    pub(crate) sweep: Option<Sweep>,
}

#[derive(Subcommand)]
pub(crate) enum Scenario {
    /// Run every scenario; leaves the results as JSON and as a page with charts.
    All {
        /// Few samples of each: minutes where ring 0 is emulated.
        #[arg(long)]
        quick: bool,
        /// Directory for results.json and report.html.
        #[arg(short, long, default_value = "bench-results")]
        output: PathBuf,
        #[command(flatten)]
        peers: OtherMonitors,
        #[command(flatten)]
        image: Image,
    },
    /// Fork a guest by raw ioctls, without any code of Hearth's.
    Floor(Count),
    /// Fork a template up to its first instruction, with and without a prepared VM, in turns with
    /// the baseline by raw ioctls.
    Fork(Count),
    /// Boot the base image until its agent answers a ping, then fork it up to that answer.
    Boot {
        /// Boots (each takes seconds where ring 0 is emulated).
        #[arg(short, default_value_t = 3)]
        n: usize,
        /// Forks of the booted guest.
        #[arg(long, default_value_t = 50)]
        forks: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Count the instructions of each step, on a machine whose clock counts them: those that ran,
    /// and the idle time as if it were instructions.
    Count {
        /// Samples of each kind.
        #[arg(short, default_value_t = 10)]
        n: usize,
        /// Also measure code in Python's interpreter; its image is built if it is missing.
        #[arg(long)]
        python: bool,
        #[command(flatten)]
        peers: OtherMonitors,
        #[command(flatten)]
        image: Image,
    },
    /// Create VMs, run them to their first instruction and destroy them; check for anything that
    /// stays.
    Churn {
        /// Batches of 20 VMs, each of VMs that are created and of VMs that are forked.
        #[arg(short, default_value_t = 20)]
        n: usize,
    },
    /// Run a plain program in guests of a warm pool, and code in their warm interpreters, from the
    /// hand-off to the result.
    Exec {
        /// Guests of each kind.
        #[arg(short, default_value_t = 20)]
        n: usize,
        /// Languages of the interpreters; their images are built if they are missing.
        #[arg(long, value_delimiter = ',', default_value = "shell,python,javascript")]
        languages: Vec<Language>,
        /// Guests of each language that boot without a template.
        #[arg(long, default_value_t = 1)]
        cold: usize,
        #[command(flatten)]
        peers: OtherMonitors,
        #[command(flatten)]
        image: Image,
    },
    /// Take memory from a guest and give it back, through its balloon and through free page
    /// reporting.
    Balloon {
        /// How often the balloon inflates and deflates.
        #[arg(short, default_value_t = 10)]
        n: usize,
        /// Programs that leave freed memory behind, for each way to return it.
        #[arg(long, default_value_t = 3)]
        touches: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Print a run's JSON as the table that the run would have printed.
    Show {
        /// The output of a run with --json.
        results: PathBuf,
    },
    /// Print the counts of a counting run in thousands of instructions, a line each: the format of
    /// benches/hardware-counts.txt.
    Counts {
        /// The output of `count` with --json.
        results: PathBuf,
    },
    /// Make a page with charts of a run's JSON.
    Report {
        /// The output of a run with --json.
        results: PathBuf,
        /// The page.
        #[arg(short, long, default_value = "report.html")]
        output: PathBuf,
    },
    /// Write a run's figures, or its counts, into a document that has a place for them.
    Figures {
        /// The output of a run with --json.
        results: PathBuf,
        /// The document.
        document: PathBuf,
    },
    /// Compare two runs' JSON; exit code 1 if anything became slower.
    Compare {
        /// The earlier run.
        old: PathBuf,
        /// The later run.
        new: PathBuf,
    },
    /// Take guests from a warm pool: alone, up to their first pong, in a burst, during a refill.
    Handoff {
        #[command(flatten)]
        count: Count,
        #[command(flatten)]
        image: Image,
    },
    /// Boot and restore guests with other monitors, in turns with Hearth: same kernel, initramfs,
    /// kernel parameters and sizes.
    Peers {
        /// Samples of each side (a ratio needs 10).
        #[arg(short, default_value_t = 10)]
        n: usize,
        #[command(flatten)]
        peers: OtherMonitors,
        #[command(flatten)]
        image: Image,
    },
    /// Talk to the agent of a clone: pings, fresh connections, a new identity.
    Ping {
        /// Exchanges of each kind.
        #[arg(short, default_value_t = 50)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Exchange bytes with a program in a guest, in turns with one at the other end of a Unix
    /// socket pair.
    Vsock {
        /// Exchanges of each kind, on each side.
        #[arg(short, default_value_t = 15)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Refill an emptied pool from a template, and make guests one by one.
    Refill {
        /// How often the pool is emptied.
        #[arg(short, default_value_t = 10)]
        n: usize,
        /// Guests that are made one by one.
        #[arg(long, default_value_t = 50)]
        forks: usize,
        #[command(flatten)]
        image: Image,
    },
    /// End parked guests in every way, and wait for their replacements.
    Replace {
        /// Replacements for each way.
        #[arg(short, default_value_t = 10)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Keep many parked clones of one guest alive at once: the memory, threads and time that each
    /// takes.
    Density {
        /// Clones; each takes six descriptors (ulimit -n) and a thread.
        #[arg(short, default_value_t = 100)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Measure a full pool that serves no requests, with paused and with running guests.
    Idle {
        /// Guests in the pool.
        #[arg(short, default_value_t = 20)]
        n: usize,
        /// How long, for each way to park guests.
        #[arg(long, default_value_t = 30)]
        seconds: u64,
        #[command(flatten)]
        image: Image,
    },
}

#[derive(Args)]
pub(crate) struct OtherMonitors {
    /// QEMU's program for x86-64: boots on its microvm machine.
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
    /// Firecracker's program: boots, and restores from a fresh snapshot.
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Seconds after which a monitor's guest counts as hanging.
    #[arg(long, value_name = "SECONDS")]
    peer_limit: Option<u64>,
}

impl OtherMonitors {
    pub(crate) fn peers(&self) -> Peers {
        Peers {
            firecracker: self.firecracker.clone(),
            qemu: self.qemu.clone(),
            limit: self.peer_limit.map(Duration::from_secs),
        }
    }
}

#[derive(Args)]
pub(crate) struct Image {
    /// A kernel of your own; without it, the cached base image.
    #[arg(long, requires = "initramfs")]
    kernel: Option<PathBuf>,
    /// An initramfs with the agent.
    #[arg(long, requires = "kernel")]
    initramfs: Option<PathBuf>,
}

impl Image {
    /// Kernel and initramfs.
    pub(crate) fn files(&self) -> Result<(PathBuf, PathBuf), ImagesError> {
        match (&self.kernel, &self.initramfs) {
            (Some(kernel), Some(initramfs)) => Ok((kernel.clone(), initramfs.clone())),
            _ => {
                let image = Images::open(None)?.base(&Silent)?;
                Ok((image.kernel, image.initramfs))
            }
        }
    }
}

#[derive(Args)]
pub(crate) struct Count {
    /// Samples of each side.
    #[arg(short, default_value_t = 200)]
    pub(crate) n: usize,
}

impl Scenario {
    /// The image that the scenario boots, if any.
    pub(crate) fn image(&self) -> Option<&Image> {
        match self {
            Self::Floor(_) | Self::Fork(_) | Self::Churn { .. } => None,
            Self::Report { .. } | Self::Figures { .. } | Self::Compare { .. } => None,
            Self::Show { .. } | Self::Counts { .. } => None,
            Self::All { image, .. }
            | Self::Balloon { image, .. }
            | Self::Boot { image, .. }
            | Self::Count { image, .. }
            | Self::Density { image, .. }
            | Self::Exec { image, .. }
            | Self::Handoff { image, .. }
            | Self::Idle { image, .. }
            | Self::Peers { image, .. }
            | Self::Ping { image, .. }
            | Self::Refill { image, .. }
            | Self::Replace { image, .. }
            | Self::Vsock { image, .. } => Some(image),
        }
    }

    /// The keys that the scenario can be swept over.
    pub(crate) fn keys(&self) -> &'static [Key] {
        match self {
            // The baseline has one size, and so has a fork that is compared with it.
            Self::All { .. } | Self::Floor(_) | Self::Fork(_) => &[],
            Self::Report { .. } | Self::Figures { .. } | Self::Compare { .. } => &[],
            Self::Show { .. } | Self::Counts { .. } => &[],
            Self::Density { .. } | Self::Idle { .. } => &[Key::Memory, Key::Vcpus, Key::Guests],
            _ => &[Key::Memory, Key::Vcpus],
        }
    }
}
