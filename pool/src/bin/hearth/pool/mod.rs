//! `hearth pool`: a pool in this process, with a load on it, shown while it runs.

mod latency;
mod load;
mod screen;
mod summary;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::builder::RangedU64ValueParser;
use hearth_images::{Images, ImagesError, RecipeError};
use hearth_pool::kvm::{KvmBackend, KvmImage};
use hearth_pool::{ConfigError, Pool, PoolConfig, Profile, StartError};
use hearth_vmm::HostError;

use self::load::Load;
use self::screen::Screen;
use self::summary::Summary;
use crate::failure::failed;
use crate::guest::{Image, RunError, image_by_name};
use crate::machine::seconds;
use crate::progress;
use crate::runtime::{self, RuntimeError};
use crate::signals::Signals;
use crate::{FAILED, signals};

/// Default number of VMs kept warm.
const WARM: usize = 4;
/// Interval of the display on a terminal (`FRAME`), and of the lines elsewhere (`LINE`).
const FRAME: Duration = Duration::from_millis(100);
const LINE: Duration = Duration::from_secs(1);

/// Starts a pool with a load on it, and shows both
///
/// So many tasks at a time acquire a guest, run a program in it and release it. The pool lives in
/// this process and ends with it. Ctrl-C ends the load; the summary goes to stdout. Without a
/// terminal on stderr there is a line each second.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Args {
    /// Profile: one of --config, or else the name of an image (base, python, javascript, shell)
    #[arg(long, value_name = "NAME", default_value = "base")]
    profile: String,
    /// Description of the pool (TOML), instead of one of that image with the usual values
    #[arg(long, value_name = "PATH", conflicts_with = "warm")]
    config: Option<PathBuf>,
    /// Guests to keep warm [default: 4]
    #[arg(long, value_name = "N", value_parser = count())]
    warm: Option<usize>,
    /// Tasks at a time that want a guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    load: usize,
    /// Ends the load after so many seconds [default: with Ctrl-C]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<Duration>,
    /// Prints the summary as one line of JSON
    #[arg(long)]
    json: bool,
    /// The program to run in each guest, and its arguments [default: true]
    #[arg(last = true, value_name = "ARGV")]
    argv: Vec<OsString>,
}

const EXIT_CODES: &str = "\
Exit codes:
  0    the load ended, and every task that got a guest ran its program in it
  125  the pool did not start, a program could not be run or did not exit with code 0, or wrong usage
  129, 130, 131, 143  a signal came before the pool was ready";

fn count() -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser;
    let numbers = RangedU64ValueParser::<u64>::new().range(1..=10_000);
    numbers.map(|number| usize::try_from(number).unwrap_or(usize::MAX))
}

#[derive(Debug, thiserror::Error)]
enum PoolError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the pool's description is not as it should be")]
    Config(#[from] ConfigError),
    #[error("the description has no profile {name}; it has {}", known.join(", "))]
    NoProfile { name: String, known: Vec<String> },
    #[error(
        "profile {profile} asks for packages ({}), and the built-in image {image} has none but its own: \
         leave them out, or build an image that has them and use the library",
        packages.join(", ")
    )]
    Packages {
        profile: String,
        image: String,
        packages: Vec<String>,
    },
    #[error(transparent)]
    Image(#[from] RunError),
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Images(#[from] ImagesError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("the pool did not start")]
    Start(#[from] StartError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("cannot wait for signals")]
    Signals(#[source] std::io::Error),
    #[error("ended by signal {0} before the pool was ready")]
    Signal(u8),
}

pub(crate) fn pool(args: &Args) -> ExitCode {
    let summary = match run(args) {
        Ok(summary) => summary,
        Err(PoolError::Signal(signal)) => return ExitCode::from(signals::exit_code(signal)),
        Err(error) => return failed(&error),
    };
    match args.json {
        true => println!("{}", summary.line()),
        false => print!("{summary}"),
    }
    match summary.is_good() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(FAILED),
    }
}

fn run(args: &Args) -> Result<Summary, PoolError> {
    let config = config(args)?;
    let mut backend = KvmBackend::builder(&config)?;
    for (name, image) in images(&config)? {
        backend = backend.image(name, image);
    }
    let backend = backend.build();
    runtime::on_all_processors()?.block_on(async {
        let pool = Pool::new(backend, config)?;
        let result = under_load(args, &pool).await;
        pool.stop().await;
        result
    })
}

fn config(args: &Args) -> Result<PoolConfig, PoolError> {
    let Some(path) = &args.config else {
        let memory_mib = image_by_name(&args.profile)?.memory_mib();
        let profile = Profile::new(&args.profile, &args.profile)
            .memory_mib(u32::try_from(memory_mib).unwrap_or(u32::MAX))
            .warm_pool_size(args.warm.unwrap_or(WARM));
        return Ok(PoolConfig::new(args.load).profile(profile));
    };
    let text = std::fs::read_to_string(path).map_err(|source| PoolError::Read {
        path: path.clone(),
        source,
    })?;
    let config = PoolConfig::from_toml(&text)?;
    if let Some(profile) = config.profiles.iter().find(|of| !of.packages.is_empty()) {
        return Err(PoolError::Packages {
            profile: profile.name.clone(),
            image: profile.image.clone(),
            packages: profile.packages.iter().cloned().collect(),
        });
    }
    let names = config.profiles.iter().map(|profile| &profile.name);
    match names.clone().any(|name| *name == args.profile) {
        true => Ok(config),
        false => Err(PoolError::NoProfile {
            name: args.profile.clone(),
            known: names.cloned().collect(),
        }),
    }
}

/// The files of each image that the profiles name.
fn images(config: &PoolConfig) -> Result<Vec<(String, KvmImage)>, PoolError> {
    let base = Images::open(None)?.base(progress::on_stderr().as_ref())?;
    let mut found: Vec<(String, KvmImage)> = Vec::new();
    for Profile { image: name, .. } in &config.profiles {
        if found.iter().any(|(known, _)| known == name) {
            continue;
        }
        let files = KvmImage::new(&base.kernel, &base.initramfs);
        let files = match image_by_name(name)? {
            Image::Base => files,
            image => match image.root(&[])? {
                Some(root) => files.root(root),
                None => files,
            },
        };
        found.push((name.clone(), files));
    }
    Ok(found)
}

/// Starts the pool, and the load once the pool is ready; returns the summary when the load ends.
async fn under_load(args: &Args, pool: &Pool<KvmBackend>) -> Result<Summary, PoolError> {
    let mut signals = Signals::catch().map_err(PoolError::Signals)?;
    let screen = Screen::on_stderr();
    let began = Instant::now();
    let starting = async {
        let mut start = std::pin::pin!(pool.start());
        loop {
            match tokio::time::timeout(screen.pause(), &mut start).await {
                Ok(started) => return started,
                Err(_) => screen.starting(pool, &args.profile, began.elapsed()),
            }
        }
    };
    tokio::select! {
        started = starting => drop(started?),
        signal = signals.next() => return Err(PoolError::Signal(signal)),
    }
    let started = began.elapsed();

    let load = Arc::new(Load::new(args.profile.clone(), &args.argv));
    let tasks = load.start(pool, args.load);
    let began = Instant::now();
    let end = args.seconds.and_then(|time| began.checked_add(time));
    loop {
        let now = Instant::now();
        let rest = end.map_or(screen.pause(), |end| end.saturating_duration_since(now));
        if rest.is_zero() {
            break;
        }
        tokio::select! {
            _ = signals.next() => break,
            () = tokio::time::sleep(rest.min(screen.pause())) => {
                screen.show(pool, &args.profile, &load.tally(), began.elapsed());
            }
        }
    }
    let took = began.elapsed();
    let status = pool.status();
    // Unfinished runs do not count.
    drop(tasks);
    screen.clear();
    let counts = status.profile(&args.profile).map(|profile| profile.counts);
    let counts = counts.unwrap_or_default();
    Ok(Summary::new(
        &args.profile,
        args.load,
        started,
        took,
        counts,
        &load.tally(),
    ))
}
