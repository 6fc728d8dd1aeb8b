//! Runs every scenario, one after the other.

use std::time::{Duration, Instant};

use hearth_pool::Language;

use crate::peer::Peers;
use crate::report::Report;
use crate::scenario::boot::Files;
use crate::scenario::languages::{self, Rounds};
use crate::scenario::{
    ScenarioError, balloon, boot, churn, density, exec, fork, handoff, idle, peers, ping, refill,
    replace, vsock,
};

/// How many samples are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// As few as are meaningful: the whole suite takes minutes where ring 0 is emulated.
    Quick,
    /// The number that each scenario takes when it is run alone.
    Full,
}

impl Effort {
    fn of(self, quick: usize, full: usize) -> usize {
        match self {
            Self::Quick => quick,
            Self::Full => full,
        }
    }
}

/// A scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the command's help says what each is")]
pub enum Step {
    Floor,
    Fork,
    Churn,
    Boot,
    Peers,
    Ping,
    Handoff,
    Exec,
    Refill,
    Replace,
    Density,
    Vsock,
    Balloon,
    Idle,
}

impl Step {
    /// All steps; those that need no guest image come first.
    pub const ALL: [Self; 14] = [
        Self::Floor,
        Self::Fork,
        Self::Churn,
        Self::Boot,
        Self::Peers,
        Self::Ping,
        Self::Handoff,
        Self::Exec,
        Self::Refill,
        Self::Replace,
        Self::Density,
        Self::Vsock,
        Self::Balloon,
        Self::Idle,
    ];

    /// Returns the name in the command and its results.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Floor => "floor",
            Self::Fork => "fork",
            Self::Churn => "churn",
            Self::Boot => "boot",
            Self::Peers => "peers",
            Self::Ping => "ping",
            Self::Handoff => "handoff",
            Self::Exec => "exec",
            Self::Refill => "refill",
            Self::Replace => "replace",
            Self::Density => "density",
            Self::Vsock => "vsock",
            Self::Balloon => "balloon",
            Self::Idle => "idle",
        }
    }

    async fn run(
        self,
        report: &mut Report,
        files: Files<'_>,
        peers: &Peers,
        effort: Effort,
    ) -> Result<(), ScenarioError> {
        let n = |quick, full| effort.of(quick, full);
        match self {
            Self::Floor => fork::floor_only(report, n(50, 200)),
            Self::Fork => fork::beside_floor(report, n(50, 200)).await,
            Self::Churn => churn::run(report, files.shape, n(10, 20)).await,
            Self::Boot => boot::run(report, files, n(2, 10), n(20, 50)).await,
            // A ratio needs 10 of each side.
            Self::Peers => peers::run(report, files, peers, 10).await,
            Self::Ping => ping::run(report, files, n(20, 50)).await,
            Self::Handoff => handoff::run(report, files, n(64, 200)).await,
            Self::Exec => {
                exec::run(report, files, n(10, 20)).await?;
                // Node.js takes minutes to start where ring 0 is emulated.
                let count = n(2, Language::ALL.len());
                let languages = [Language::Shell, Language::Python, Language::Javascript];
                let languages = languages.get(..count).unwrap_or_default();
                let rounds = Rounds {
                    warm: n(10, 20),
                    cold: n(1, 2),
                };
                languages::run(report, files, languages, rounds, peers).await;
                Ok(())
            }
            Self::Refill => refill::run(report, files, n(5, 10), n(20, 50)).await,
            Self::Replace => replace::run(report, files, n(3, 10)).await,
            Self::Density => density::run(report, files, n(50, 100)).await,
            Self::Vsock => vsock::run(report, files, n(10, 15)).await,
            Self::Balloon => balloon::run(report, files, n(5, 10), n(1, 3)).await,
            Self::Idle => {
                let time = Duration::from_secs(n(10, 30) as u64);
                idle::run(report, files, 20, time).await
            }
        }
    }
}

/// Runs all scenarios. A scenario that fails counts as not measured, and the next one is run.
pub async fn run(
    report: &mut Report,
    files: Files<'_>,
    peers: &Peers,
    effort: Effort,
    progress: impl Fn(&str),
) {
    let count = Step::ALL.len();
    for (index, step) in Step::ALL.into_iter().enumerate() {
        let name = step.name();
        progress(&format!("{} of {count}: {name}", index + 1));
        let begin = Instant::now();
        match step.run(report, files, peers, effort).await {
            Ok(()) => progress(&format!("    {:.1} s", begin.elapsed().as_secs_f64())),
            Err(error) => {
                let why = chain(&error);
                progress(&format!("    NOT MEASURED: {why}"));
                report.not_measured.push(format!("{name}: {why}"));
            }
        }
    }
}

/// Formats an error with all its causes.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
