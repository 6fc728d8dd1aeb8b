//! A subscriber whose spans and log events tests can read, each test its own.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Once;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt};

/// A span by its name, or an event by its message.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) name: String,
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
    /// Closed spans; the registry reuses their numbers.
    closed: Vec<Seen>,
    events: Vec<Seen>,
}

thread_local! {
    /// Each test has a thread, on which its pools run.
    static HERE: RefCell<Book> = RefCell::default();
}

/// The spans and events of this thread since [`Trace::begin`].
#[derive(Debug)]
pub(crate) struct Trace(());

impl Trace {
    /// Begins a trace. The subscriber is installed for the whole process: one for a single thread
    /// can miss callsites that another thread has reached before.
    pub(crate) fn begin() -> Self {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let subscriber = tracing_subscriber::registry().with(Watch);
            tracing::subscriber::set_global_default(subscriber).expect("the only one");
        });
        HERE.take();
        Self(())
    }

    pub(crate) fn spans(&self) -> Vec<Seen> {
        HERE.with_borrow(|book| {
            let all = book.closed.iter().chain(book.spans.values());
            all.cloned().collect()
        })
    }

    pub(crate) fn events(&self) -> Vec<Seen> {
        HERE.with_borrow(|book| book.events.clone())
    }
}

struct Watch;

impl<S: Subscriber> Layer<S> for Watch {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        if !attributes.metadata().target().starts_with("hearth_pool") {
            return;
        }
        let mut seen = Seen {
            name: attributes.metadata().name().to_owned(),
            ..Seen::default()
        };
        attributes.record(&mut seen);
        HERE.with_borrow_mut(|book| book.spans.insert(id.into_u64(), seen));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        HERE.with_borrow_mut(|book| {
            if let Some(seen) = book.spans.get_mut(&id.into_u64()) {
                values.record(seen);
            }
        });
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        HERE.with_borrow_mut(|book| {
            let seen = book.spans.remove(&id.into_u64());
            book.closed.extend(seen);
        });
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut seen = Seen::default();
        event.record(&mut seen);
        seen.name = seen.fields.remove("message").unwrap_or_default();
        HERE.with_borrow_mut(|book| book.events.push(seen));
    }
}
