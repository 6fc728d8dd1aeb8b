//! Skips tests that cannot run here, and scales the time limits of those that can.

use std::future::Future;
use std::io::Write;
use std::panic::Location;
use std::time::Duration;

use hearth_vmm::Host;

/// Reports that a test is skipped, and why. The line goes to the real stderr, past the test
/// runner's capture, because a runner counts these lines: a test that printed one was skipped and
/// did not pass.
#[track_caller]
pub fn not_measured(reason: &str) {
    let place = Location::caller();
    print_past_capture(&format!(
        "{UNMEASURED}{reason} ({}:{})",
        place.file(),
        place.line()
    ));
}

/// The start of the line that reports a skipped test.
pub(crate) const UNMEASURED: &str = "NOT MEASURED: ";

pub(crate) fn print_past_capture(line: &str) {
    let _ = std::io::stderr().write_all(format!("\n{line}\n").as_bytes());
}

/// Returns whether there is a `/dev/kvm` to test on, and reports the test as skipped if not. A
/// `/dev/kvm` that does not work is no reason to skip: the tests then fail.
#[must_use]
#[track_caller]
pub fn kvm() -> bool {
    let there = std::path::Path::new("/dev/kvm").exists();
    if !there {
        not_measured("no /dev/kvm");
    }
    there
}

/// Scales a timeout that was chosen for hardware to this host.
///
/// # Panics
/// If the host cannot run guests.
#[must_use]
pub fn patience(hardware: Duration) -> Duration {
    let host = Host::get().expect("the host runs guests");
    hardware * host.timeout_factor()
}

/// Waits for `future`. Fails the test with `what` in the message after `seconds` on hardware.
///
/// # Panics
/// When the time is over.
pub async fn within<T>(seconds: u64, what: &str, future: impl Future<Output = T>) -> T {
    let limit = patience(Duration::from_secs(seconds));
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing after {limit:?}"),
    }
}
