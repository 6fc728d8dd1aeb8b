//! Many clones of one template alive at once, parked as a pool does it: the cost of each to the
//! host.

use std::time::{Duration, Instant};

use hearth_agent::proto::{InstanceId, Refresh};
use hearth_vmm::{Template, Vm};

use super::agent::{Agent, refresh, resume, template};
use super::boot::Files;
use super::{ScenarioError, us};
use crate::fit::Fit;
use crate::process::Held;
use crate::report::Report;
use crate::stats::quantile;
use crate::sweep::Key;
use crate::target::{Bound, Statistic};

const SCENARIO: &str = "density";
const SIDE: &str = "hearth";
/// How long destroyed clones may take to be gone.
const GONE: Duration = Duration::from_secs(10);
/// Most private memory of a parked clone, in KiB.
const MOST_KIB: f64 = 2048.0;

/// Points of a curve.
const POINTS: usize = 10;

/// A paused clone with an identity of its own, unique after restore.
struct Parked {
    vm: Vm,
    agent: Agent,
    identity: InstanceId,
}

impl Parked {
    async fn new(template: &Template, number: u128) -> Result<Self, ScenarioError> {
        let vm = template.fork().map_err(ScenarioError::at("fork"))?;
        let agent = resume(&vm)?;
        let identity = InstanceId(number.to_ne_bytes());
        let mut parked = Self {
            vm,
            agent,
            identity,
        };
        let refresh = Refresh {
            instance: Some(identity),
            ..refresh()
        };
        let refreshed = parked.agent.refresh_and_ping(refresh, 0).await;
        refreshed.map_err(ScenarioError::at("reseed"))?;
        parked.answered(0).await?;
        parked.vm.pause().map_err(ScenarioError::at("pause"))?;
        Ok(parked)
    }

    /// Receives the answer to a ping; it must carry the clone's own identity.
    async fn answered(&mut self, nonce: u64) -> Result<(), ScenarioError> {
        let pong = self.agent.pong(nonce).await;
        let pong = pong.map_err(ScenarioError::at("ping"))?;
        match pong.instance == self.identity {
            true => Ok(()),
            false => Err(ScenarioError::at("identity")("a clone answers for another")),
        }
    }

    /// Runs the clone for one ping.
    async fn ping(&mut self) -> Result<(), ScenarioError> {
        self.vm.resume().map_err(ScenarioError::at("resume"))?;
        let pong = self.agent.ping(1).await;
        let pong = pong.map_err(ScenarioError::at("ping"))?;
        if pong.instance != self.identity {
            return Err(ScenarioError::at("identity")("a clone answers for another"));
        }
        self.vm.pause().map_err(ScenarioError::at("pause"))
    }
}

/// Makes `n` clones, measures what they hold, has each answer with its own identity, and destroys
/// them.
///
/// # Errors
/// When a clone cannot be made, answers for another, or leaves something behind.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let template = template(files).await?;
    // The first clone starts the library's own threads, which stay.
    Parked::new(&template, 0).await?.vm.destroy();
    let before = held()?;
    let mut clones = Vec::with_capacity(n);
    let mut made = Vec::with_capacity(n);
    let (mut pss, mut fall) = (vec![], vec![]);
    for number in (1..).take(n) {
        let start = Instant::now();
        clones.push(Parked::new(&template, number).await?);
        made.push(us(start.elapsed()));
        if clones.len() % n.div_ceil(POINTS) == 0 {
            let (count, now) = (clones.len() as f64, held()?);
            pss.push((count, now.pss_kib as f64 - before.pss_kib as f64));
            let available = before.available_kib as f64 - now.available_kib as f64;
            fall.push((count, available));
        }
    }
    report.fits.extend(curve("PSS of all", &pss));
    report
        .fits
        .extend(curve("fall of MemAvailable by all", &fall));
    report.add(SCENARIO, "fork to parked", "us", SIDE, made);
    costs(report, before, held()?, n);
    let private = private_kib(&clones)?;
    report.add(SCENARIO, "private memory", "KiB", SIDE, private);
    report.expect(
        "private memory",
        SIDE,
        Statistic::P50,
        Bound::AtMost(MOST_KIB),
    );

    let mut answered = Vec::with_capacity(n);
    for clone in &mut clones {
        let start = Instant::now();
        clone.ping().await?;
        answered.push(us(start.elapsed()));
    }
    report.add(SCENARIO, "resume, ping and pause", "us", SIDE, answered);
    let private = private_kib(&clones)?;
    report.add(SCENARIO, "private memory after it", "KiB", SIDE, private);

    let mut destroyed = Vec::with_capacity(n);
    for Parked { vm, agent, .. } in clones {
        let start = Instant::now();
        drop(agent);
        vm.destroy();
        destroyed.push(us(start.elapsed()));
    }
    report.add(SCENARIO, "destroy", "us", SIDE, destroyed);
    nothing_left(before).await
}

fn held() -> Result<Held, ScenarioError> {
    Held::now().map_err(ScenarioError::at("what this process holds"))
}

fn private_kib(clones: &[Parked]) -> Result<Vec<f64>, ScenarioError> {
    let each = clones.iter().map(|clone| {
        let bytes = clone.vm.private_bytes();
        bytes.map(|bytes| bytes as f64 / 1024.0)
    });
    let all: std::io::Result<_> = each.collect();
    all.map_err(ScenarioError::at("private memory"))
}

/// Fits how a total over all clones grows with their number. The confidence interval comes from the
/// slopes between neighbouring points.
fn curve(metric: &str, points: &[(f64, f64)]) -> Option<Fit> {
    let samples: Vec<_> = points.iter().map(|(at, kib)| (*at, [*kib])).collect();
    let samples: Vec<(f64, &[f64])> = samples.iter().map(|(at, kib)| (*at, &kib[..])).collect();
    let stretches = points.windows(2).filter_map(|pair| match pair {
        [(from, less), (to, more)] => Some((more - less) / (to - from)),
        _ => None,
    });
    let mut slopes: Vec<f64> = stretches.collect();
    slopes.sort_by(f64::total_cmp);
    Some(Fit {
        scenario: SCENARIO.into(),
        metric: metric.into(),
        unit: "KiB".into(),
        side: SIDE.into(),
        per: Key::Guests.unit().into(),
        ci95: [quantile(&slopes, 0.025)?, quantile(&slopes, 0.975)?],
        ..Fit::of(&samples)?
    })
}

/// Reports what all clones hold, divided by their number.
fn costs(report: &mut Report, before: Held, after: Held, n: usize) {
    let each = |all: f64| vec![all / n.max(1) as f64];
    let pss = after.pss_kib as f64 - before.pss_kib as f64;
    let fall = before.available_kib as f64 - after.available_kib as f64;
    let threads = after.threads as f64 - before.threads as f64;
    let fds = after.fds as f64 - before.fds as f64;
    report.add(SCENARIO, "clones alive at once", "", SIDE, vec![n as f64]);
    report.add(SCENARIO, "PSS of each", "KiB", SIDE, each(pss));
    report.add(
        SCENARIO,
        "fall of MemAvailable by each",
        "KiB",
        SIDE,
        each(fall),
    );
    report.add(SCENARIO, "threads of each", "", SIDE, each(threads));
    report.add(SCENARIO, "descriptors of each", "", SIDE, each(fds));
}

/// Waits until threads and descriptors are as before.
async fn nothing_left(before: Held) -> Result<(), ScenarioError> {
    let deadline = Instant::now() + GONE;
    loop {
        let now = held()?;
        if now.threads <= before.threads && now.fds <= before.fds {
            return Ok(());
        }
        if Instant::now() > deadline {
            let left = format!(
                "{} threads and {} descriptors, {} and {} before",
                now.threads, now.fds, before.threads, before.fds
            );
            return Err(ScenarioError::at("clones left something behind")(left));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
