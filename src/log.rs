//! Log lines go through `tracing`; in a C program, to the caller's callback.

use crate::process::PerProcess;
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once, RwLock};
use tracing::field::{Field, Visit};
use tracing::span;

/// `(level 1..=5, target, message)`.
pub type Sink = Arc<dyn Fn(u32, &CStr, &CStr) + Send + Sync>;

/// A process' own, because a fork can come while another thread holds the lock.
static SINK: PerProcess<RwLock<Option<Sink>>> = PerProcess::new();
static MAX_LEVEL: AtomicU32 = AtomicU32::new(0);

/// This process' sink: a fork begins with that of its parent, unless it was just being replaced.
fn sink() -> &'static RwLock<Option<Sink>> {
    SINK.get_or_make(|parents| {
        let inherited = parents.and_then(|sink| sink.try_read().ok()?.clone());
        RwLock::new(inherited)
    })
}

/// Replaces the sink. The first call installs the subscriber, unless the program (a Rust one) has
/// its own, which then goes on to receive everything.
pub fn set_sink(sink: Option<Sink>, max_level: u32) {
    static INSTALL: Once = Once::new();
    MAX_LEVEL.store(if sink.is_some() { max_level } else { 0 }, Ordering::Relaxed);
    *self::sink().write().unwrap_or_else(|poisoned| poisoned.into_inner()) = sink;
    INSTALL.call_once(|| {
        // An error says that there is a subscriber already: see above.
        let _ = tracing::subscriber::set_global_default(ToSink);
    });
    tracing::callsite::rebuild_interest_cache();
}

fn number(level: &tracing::Level) -> u32 {
    match *level {
        tracing::Level::ERROR => 1,
        tracing::Level::WARN => 2,
        tracing::Level::INFO => 3,
        tracing::Level::DEBUG => 4,
        tracing::Level::TRACE => 5,
    }
}

/// A subscriber that knows events and no spans.
struct ToSink;

impl tracing::Subscriber for ToSink {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        number(metadata.level()) <= MAX_LEVEL.load(Ordering::Relaxed)
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        let target = CString::new(event.metadata().target()).unwrap_or_default();
        let text = CString::new(message.0.replace('\0', "")).unwrap_or_default();
        // Not called under the lock: a callback may replace itself.
        let sink = sink().read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone();
        if let Some(sink) = sink {
            sink(number(event.metadata().level()), &target, &text);
        }
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}
