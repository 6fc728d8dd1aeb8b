//! The cost of requests to an agent: on the connection that a clone has from its template, on new
//! connections, and for a refresh that makes the clone unique after restore.

use std::time::{Duration, Instant};

use hearth_vmm::{Template, Vm};

use super::agent::{Agent, dial, refresh, renew, resume, template};
use super::boot::Files;
use super::{ScenarioError, us};
use crate::report::Report;

/// Metric of both kinds of clones: those that fault in their pages one by one, and those with
/// prefetched pages.
const TO_PONG: &str = "fork to pong, reseeded";
/// Time after which a guest without requests is idle.
const REST: Duration = Duration::from_millis(100);

/// Measures `n` exchanges of each kind, in turns, with one clone, and `2 * n` clones up to their
/// first answer: every second clone has those pages prefetched that another clone touched.
/// # Errors
/// When a guest cannot be made or does not answer.
pub async fn run(report: &mut Report, files: Files<'_>, n: usize) -> Result<(), ScenarioError> {
    let template = template(files).await?.count_instructions(true);
    let mut to_pong = Series::new(TO_PONG);
    let mut prefetched = Series {
        side: "prefetched",
        ..Series::new(TO_PONG)
    };
    let touched = first_pong(&template, &mut Series::new(TO_PONG)).await?;
    let set = touched.working_set();
    let set = set.map_err(ScenarioError::at("working set"))?;
    touched.destroy();
    let written = set.written_bytes() as f64 / 1024.0;
    let ready = template.clone().prefetch(set);
    for _ in 0..n {
        first_pong(&template, &mut to_pong).await?.destroy();
        first_pong(&ready, &mut prefetched).await?.destroy();
    }
    to_pong.report(report);
    prefetched.report(report);
    report.compare(TO_PONG, "prefetched", "hearth");
    let metric = "written up to the first pong";
    report.add("ping", metric, "KiB", "hearth", vec![written]);

    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    let mut agent = resume(&vm)?;
    renew(&mut agent, 0).await?;
    let mut ping = Series::new("ping");
    let mut fresh = Series::new("ping on a fresh connection");
    let mut reseed = Series::new("reseed");
    for nonce in (1..).take(n) {
        ping.time(&vm, pong(&mut agent, nonce)).await?;
        reseed.time(&vm, reseeded(&mut agent)).await?;
        fresh.time(&vm, greeted(&vm)).await?;
    }
    for series in [ping, reseed, fresh] {
        series.report(report);
    }
    Ok(())
}

/// Forks a clone and waits for its first answer.
async fn first_pong(template: &Template, series: &mut Series) -> Result<Vm, ScenarioError> {
    let start = Instant::now();
    let vm = template.fork().map_err(ScenarioError::at("fork"))?;
    renew(&mut resume(&vm)?, 1).await?;
    series.add(start, vm.emulated_instructions());
    Ok(vm)
}

async fn pong(agent: &mut Agent, nonce: u64) -> Result<(), ScenarioError> {
    let pong = agent.ping(nonce).await;
    pong.map(drop).map_err(ScenarioError::at("ping"))
}

async fn reseeded(agent: &mut Agent) -> Result<(), ScenarioError> {
    let refreshed = agent.refresh(refresh()).await;
    refreshed.map(drop).map_err(ScenarioError::at("reseed"))
}

async fn greeted(vm: &Vm) -> Result<(), ScenarioError> {
    pong(&mut dial(vm.vsock()).await?, 1).await
}

/// Times and emulated instructions of one kind of exchange.
struct Series {
    what: &'static str,
    side: &'static str,
    us: Vec<f64>,
    instructions: Vec<f64>,
}

impl Series {
    fn new(what: &'static str) -> Self {
        let (us, instructions) = (Vec::new(), Vec::new());
        Self {
            what,
            side: "hearth",
            us,
            instructions,
        }
    }

    fn add(&mut self, start: Instant, instructions: Option<u64>) {
        self.us.push(us(start.elapsed()));
        self.instructions
            .extend(instructions.map(|count| count as f64));
    }

    /// Measures one exchange, after time for the guest to become idle.
    async fn time(
        &mut self,
        vm: &Vm,
        exchange: impl Future<Output = Result<(), ScenarioError>>,
    ) -> Result<(), ScenarioError> {
        tokio::time::sleep(REST).await;
        let before = vm.emulated_instructions();
        let start = Instant::now();
        exchange.await?;
        let after = vm.emulated_instructions();
        self.add(
            start,
            after.zip(before).map(|(after, before)| after - before),
        );
        Ok(())
    }

    fn report(self, report: &mut Report) {
        report.add("ping", self.what, "us", self.side, self.us);
        if !self.instructions.is_empty() {
            let unit = "instructions";
            report.add("ping", self.what, unit, self.side, self.instructions);
        }
    }
}
