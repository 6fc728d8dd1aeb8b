//! Shows what an image build is doing: a bar on a terminal, plain lines elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use hearth_images::{Event, Progress, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Interval of a spinner's steps.
const TICK: Duration = Duration::from_millis(200);
/// Plain lines report progress in steps of this many per cent.
const STEP_PERCENT: u32 = 10;

/// Returns the kind of progress report that suits stderr.
pub(crate) fn on_stderr() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Box::new(Bar::new())
    } else {
        Box::new(Lines::default())
    }
}

struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        Self(ProgressBar::with_draw_target(
            None,
            ProgressDrawTarget::stderr(),
        ))
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
    }
}

impl Progress for Bar {
    fn event(&self, event: Event) {
        match event {
            Event::Begin(stage) => {
                self.0.reset();
                self.0.unset_length();
                self.0.set_message(stage.label());
                self.style("{spinner} {msg} [{elapsed}]");
                self.0.enable_steady_tick(TICK);
            }
            Event::Step { done, total, .. } => {
                self.style("{spinner} {msg} [{elapsed}] {wide_bar} {percent} %");
                self.0.set_length(total.into());
                self.0.set_position(done.into());
            }
            Event::End(stage) => {
                let took = self.0.elapsed();
                self.0
                    .suspend(|| eprintln!("{} ({:.1} s)", stage.label(), took.as_secs_f64()));
            }
            _ => {}
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

#[derive(Default)]
struct Lines {
    began: Cell<Option<Instant>>,
    /// The last percentage that was printed.
    said: Cell<u32>,
}

impl Progress for Lines {
    fn event(&self, event: Event) {
        match event {
            Event::Begin(stage) => {
                self.began.set(Some(Instant::now()));
                self.said.set(0);
                eprintln!("{}...", stage.label());
            }
            Event::Step { stage, done, total } => {
                let percent = percent(done, total);
                if percent >= self.said.get().saturating_add(STEP_PERCENT) {
                    self.said.set(percent);
                    eprintln!("{}: {percent} %", stage.label());
                }
            }
            Event::End(stage) => self.end(stage),
            _ => {}
        }
    }
}

impl Lines {
    fn end(&self, stage: Stage) {
        let took = self.began.take().map(|began| began.elapsed());
        let took = took.unwrap_or_default().as_secs_f64();
        eprintln!("{}: done in {took:.1} s", stage.label());
    }
}

fn percent(done: u32, total: u32) -> u32 {
    let percent = u64::from(done) * 100 / u64::from(total.max(1));
    u32::try_from(percent).unwrap_or(100).min(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_never_absurd() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(1, 3), 33);
        assert_eq!(percent(u32::MAX, 1), 100);
    }
}
