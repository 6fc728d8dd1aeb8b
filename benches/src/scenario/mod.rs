//! The scenarios that are measured.

mod agent;
pub mod balloon;
pub mod boot;
pub mod churn;
pub mod count;
pub mod density;
mod exchange;
pub mod exec;
pub mod floor;
pub mod fork;
pub mod handoff;
pub mod idle;
pub mod languages;
pub mod peers;
pub mod ping;
pub mod pool;
pub mod refill;
pub mod replace;
mod restored;
mod samples;
mod sleeper;
pub mod victim;
pub mod vsock;

/// Why a scenario could not be run.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct ScenarioError {
    /// The step that failed.
    what: String,
    /// Why.
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl ScenarioError {
    pub(crate) fn at<E>(what: &str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        move |e| Self {
            what: what.to_owned(),
            source: e.into(),
        }
    }
}

/// Converts a duration to microseconds.
pub(crate) fn us(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
