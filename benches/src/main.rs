//! `vmm-bench`: see `vmm-bench --help`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use hearth_bench::compare::Comparison;
use hearth_bench::environment::Environment;
use hearth_bench::page::page;
use hearth_bench::report::{Report, SCHEMA};
use hearth_bench::scenario::{boot, density, fork, handoff, idle, ping, refill, replace};
use hearth_images::{Images, ImagesError, Silent};

/// Measures what Hearth's steps cost on this machine, beside the bare ioctls that they consist of.
///
/// Close other programs first: figures from a busy machine say little. Ratios come with a 95 %
/// confidence interval, and are refused when too few samples stand behind them.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    scenario: Scenario,
    /// Print JSON with all samples instead of the table.
    #[arg(long, global = true)]
    json: bool,
    /// End with exit code 1 if a figure misses its target, or was not measured.
    #[arg(long, global = true)]
    check: bool,
}

#[derive(Subcommand)]
enum Scenario {
    /// Fork a guest by raw ioctls, without any code of Hearth's.
    Floor(Count),
    /// Fork a template up to its first instruction, with and without a ready shell, in turns with the floor.
    Fork(Count),
    /// Boot the base image to the agent's pong, then fork it to pong.
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
    /// Make a page with charts of a run's JSON.
    Report {
        /// What a run printed with --json.
        results: PathBuf,
        /// The page.
        #[arg(short, long, default_value = "report.html")]
        output: PathBuf,
    },
    /// Compare two runs' JSON; exit code 1 if anything became slower.
    Compare {
        /// The run before.
        old: PathBuf,
        /// The run after.
        new: PathBuf,
    },
    /// Take guests from a warm pool: alone, up to their first pong, in a burst, during a refill.
    Handoff {
        #[command(flatten)]
        count: Count,
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
    /// Refill an emptied pool from a template, and make guests one by one.
    Refill {
        /// Times that the pool is emptied.
        #[arg(short, default_value_t = 10)]
        n: usize,
        /// Guests made one by one.
        #[arg(long, default_value_t = 50)]
        forks: usize,
        #[command(flatten)]
        image: Image,
    },
    /// End parked guests in every way, and wait for their replacements.
    Replace {
        /// Times, for each way.
        #[arg(short, default_value_t = 10)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Keep many parked clones of one guest alive at once: memory, threads and time of each.
    Density {
        /// Clones; each takes six descriptors (ulimit -n) and a thread.
        #[arg(short, default_value_t = 100)]
        n: usize,
        #[command(flatten)]
        image: Image,
    },
    /// Leave a full pool alone, paused and running.
    Idle {
        /// Guests of the pool.
        #[arg(short, default_value_t = 20)]
        n: usize,
        /// How long, for each way to park.
        #[arg(long, default_value_t = 30)]
        seconds: u64,
        #[command(flatten)]
        image: Image,
    },
}

#[derive(Args)]
struct Image {
    /// A kernel of your own; the cached base image when not given.
    #[arg(long, requires = "initramfs")]
    kernel: Option<PathBuf>,
    /// An initramfs with the agent.
    #[arg(long, requires = "kernel")]
    initramfs: Option<PathBuf>,
}

impl Image {
    fn files(self) -> Result<(PathBuf, PathBuf), ImagesError> {
        match (self.kernel, self.initramfs) {
            (Some(kernel), Some(initramfs)) => Ok((kernel, initramfs)),
            _ => {
                let image = Images::open(None)?.base(&Silent)?;
                Ok((image.kernel, image.initramfs))
            }
        }
    }
}

#[derive(Args)]
struct Count {
    /// Samples of each side.
    #[arg(short, default_value_t = 200)]
    n: usize,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprint!("vmm-bench: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            // 1 is what a comparison says.
            ExitCode::from(2)
        }
    }
}

fn read(path: &Path) -> Result<Report, Box<dyn std::error::Error>> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| named(&e))?;
    let report: Report = serde_json::from_str(&text).map_err(|e| named(&e))?;
    if report.schema != SCHEMA {
        let other = report.schema;
        return Err(named(&format!("format {other}; this program reads {SCHEMA}")).into());
    }
    Ok(report)
}

fn run(cli: Cli) -> Result<ExitCode, Box<dyn std::error::Error>> {
    match &cli.scenario {
        Scenario::Report { results, output } => {
            std::fs::write(output, page(&read(results)?))?;
            println!("{}", output.display());
            return Ok(ExitCode::SUCCESS);
        }
        Scenario::Compare { old, new } => {
            let comparison = Comparison::of(&read(old)?, &read(new)?);
            print!("{comparison}");
            return Ok(ExitCode::from(u8::from(comparison.worse())));
        }
        _ => {}
    }
    let mut report = Report::new(Environment::here()?);
    match cli.scenario {
        Scenario::Report { .. } | Scenario::Compare { .. } => {}
        Scenario::Floor(count) => fork::floor_only(&mut report, count.n)?,
        Scenario::Fork(count) => {
            runtime()?.block_on(fork::beside_floor(&mut report, count.n))?;
        }
        Scenario::Boot { n, forks, image } => {
            let image = image.files()?;
            runtime()?.block_on(boot::run(&mut report, files(&image), n, forks))?;
        }
        Scenario::Handoff { count, image } => {
            let image = image.files()?;
            runtime()?.block_on(handoff::run(&mut report, files(&image), count.n))?;
        }
        Scenario::Ping { n, image } => {
            let image = image.files()?;
            runtime()?.block_on(ping::run(&mut report, files(&image), n))?;
        }
        Scenario::Density { n, image } => {
            let image = image.files()?;
            runtime()?.block_on(density::run(&mut report, files(&image), n))?;
        }
        Scenario::Refill { n, forks, image } => {
            let image = image.files()?;
            runtime()?.block_on(refill::run(&mut report, files(&image), n, forks))?;
        }
        Scenario::Replace { n, image } => {
            let image = image.files()?;
            runtime()?.block_on(replace::run(&mut report, files(&image), n))?;
        }
        Scenario::Idle { n, seconds, image } => {
            let (image, time) = (image.files()?, Duration::from_secs(seconds));
            runtime()?.block_on(idle::run(&mut report, files(&image), n, time))?;
        }
    }
    if cli.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(u8::from(cli.check && report.misses())))
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_time()
        .build()
}

fn files((kernel, initramfs): &(PathBuf, PathBuf)) -> boot::Files<'_> {
    boot::Files { kernel, initramfs }
}
