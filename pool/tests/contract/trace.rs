//! A subscriber of spans and log events that tests can read, for the thread that begins it.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// A span by its name, or an event by its message.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) name: &'static str,
    pub(crate) fields: BTreeMap<&'static str, String>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

#[derive(Debug, Default)]
struct Book {
    spans: BTreeMap<u64, Seen>,
    /// Those that are closed; the registry gives their numbers to others.
    closed: Vec<Seen>,
    events: Vec<Seen>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Trace(Arc<Mutex<Book>>);

impl Trace {
    pub(crate) fn begin() -> (Self, DefaultGuard) {
        let trace = Self::default();
        let subscriber = tracing_subscriber::registry().with(trace.clone());
        (trace, tracing::subscriber::set_default(subscriber))
    }

    pub(crate) fn spans(&self) -> Vec<Seen> {
        let book = self.0.lock().unwrap();
        let ours = book.closed.iter().chain(book.spans.values());
        ours.cloned().collect()
    }

    pub(crate) fn events(&self) -> Vec<Seen> {
        self.0.lock().unwrap().events.clone()
    }
}

impl<S: Subscriber> Layer<S> for Trace {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        if !attributes.metadata().target().starts_with("hearth_pool") {
            return;
        }
        let mut seen = Seen {
            name: attributes.metadata().name(),
            ..Seen::default()
        };
        attributes.record(&mut seen);
        self.0.lock().unwrap().spans.insert(id.into_u64(), seen);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        if let Some(seen) = self.0.lock().unwrap().spans.get_mut(&id.into_u64()) {
            values.record(seen);
        }
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        let mut book = self.0.lock().unwrap();
        if let Some(seen) = book.spans.remove(&id.into_u64()) {
            book.closed.push(seen);
        }
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut seen = Seen::default();
        event.record(&mut seen);
        let message = seen.fields.remove("message").unwrap_or_default();
        seen.name = message.leak();
        self.0.lock().unwrap().events.push(seen);
    }
}
