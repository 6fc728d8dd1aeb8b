//! Shows the pool and its load while they run: redrawn in place on a terminal, a line each second
//! elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use hearth_pool::kvm::KvmBackend;
use hearth_pool::{Pool, ProfileStatus};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::load::Tally;
use super::summary::time;
use super::{FRAME, LINE};

/// Width of the bar that shows the pool's VMs, in characters.
const WIDTH: usize = 40;

pub(super) enum Screen {
    Terminal(ProgressBar),
    Lines,
}

impl Screen {
    pub(super) fn on_stderr() -> Self {
        if !std::io::stderr().is_terminal() {
            return Self::Lines;
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        Self::Terminal(bar)
    }

    /// Time between two updates.
    pub(super) fn pause(&self) -> Duration {
        match self {
            Self::Terminal(_) => FRAME,
            Self::Lines => LINE,
        }
    }

    pub(super) fn starting(&self, pool: &Pool<KvmBackend>, profile: &str, since: Duration) {
        let sizes = sizes(pool.status().profile(profile));
        self.draw(&format!(
            "{profile}: starting, {:.1} s; {sizes}",
            since.as_secs_f64()
        ));
    }

    pub(super) fn show(
        &self,
        pool: &Pool<KvmBackend>,
        profile: &str,
        tally: &Tally,
        since: Duration,
    ) {
        let status = pool.status();
        let status = status.profile(profile);
        let (p50, p99) = (tally.acquire.percentile(50), tally.acquire.percentile(99));
        let head = format!("{profile}: {:.0} s; {}", since.as_secs_f64(), sizes(status));
        let load = format!(
            "hits {} misses {} runs {} failures {}",
            tally.hits, tally.misses, tally.runs, tally.failures
        );
        let times = format!(
            "acquire p50 {} p99 {}; run p50 {} p99 {}",
            time(p50),
            time(p99),
            time(tally.run.percentile(50)),
            time(tally.run.percentile(99))
        );
        match self {
            Self::Terminal(_) => {
                let failure = tally.last_failure.as_deref().unwrap_or_default();
                let picture = picture(status);
                self.draw(&format!("{head}\n{picture}\n{load}\n{times}\n{failure}"));
            }
            Self::Lines => self.draw(&format!("{head}; {load}; {times}")),
        }
    }

    pub(super) fn clear(&self) {
        if let Self::Terminal(bar) = self {
            bar.finish_and_clear();
        }
    }

    fn draw(&self, text: &str) {
        match self {
            Self::Terminal(bar) => bar.set_message(text.to_owned()),
            Self::Lines => eprintln!("{text}"),
        }
    }
}

fn sizes(status: Option<&ProfileStatus>) -> String {
    let Some(ProfileStatus { counts, .. }) = status else {
        return String::new();
    };
    format!(
        "ready {}/{} booting {} leased {} waiting {}",
        counts.ready, counts.size, counts.booting, counts.leased, counts.waiting
    )
}

/// Draws a cell for each VM (leased, ready or booting), scaled to at most `WIDTH` cells.
fn picture(status: Option<&ProfileStatus>) -> String {
    let Some(ProfileStatus { counts, .. }) = status else {
        return String::new();
    };
    let all = (counts.leased + counts.ready + counts.booting)
        .max(counts.size)
        .max(1);
    let cells = |count: usize| (count * WIDTH.min(all)).div_ceil(all);
    let parts = [
        ("#", counts.leased),
        ("=", counts.ready),
        (".", counts.booting),
    ];
    let drawn: String = parts
        .map(|(sign, count)| sign.repeat(cells(count)))
        .concat();
    format!(
        "[{drawn:<width$}] # leased = ready . booting",
        width = WIDTH.min(all)
    )
}
