//! Counts, by thread, the lines that are logged at the levels that every program shows.

use std::cell::Cell;
use std::sync::Once;

use log::{LevelFilter, Log, Metadata, Record};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};

thread_local! {
    static LINES: Cell<usize> = const { Cell::new(0) };
}

struct Counter;

impl Counter {
    fn count() {
        LINES.with(|lines| lines.set(lines.get() + 1));
    }
}

/// Counts lines of dependencies, which use the `log` crate.
impl Log for Counter {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, _: &Record<'_>) {
        Self::count();
    }

    fn flush(&self) {}
}

/// Counts lines of our own crates, which use `tracing`.
impl Subscriber for Counter {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        Self::count();
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// When dropped, fails the test if this thread has logged a line.
pub(super) struct Quiet(());

impl Quiet {
    pub(super) fn watch() -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            log::set_logger(&Counter).unwrap();
            log::set_max_level(LevelFilter::Warn);
            tracing::subscriber::set_global_default(Counter).unwrap();
        });
        Self(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(lines(), 0, "lines in the log");
        }
    }
}

/// Returns the number of lines of this thread so far.
pub(super) fn lines() -> usize {
    LINES.with(Cell::get)
}

/// Returns the number of lines of this thread so far, and resets it to zero.
pub(super) fn take() -> usize {
    LINES.with(Cell::take)
}
