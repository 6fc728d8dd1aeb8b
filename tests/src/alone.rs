//! Runs a test in a process of its own.

use std::process::{Command, Stdio};

use crate::skip::{UNMEASURED, print_past_capture};

/// Environment variable that is set for the process that runs one test.
const MARK: &str = "HEARTH_TEST_ALONE";

/// Runs the calling test again in a process of its own and returns `false`, or `true` in that
/// process.
///
/// Descriptors, threads and memory of a process can only be counted where nothing else runs: a test
/// runner starts threads, and other tests open descriptors, at any moment.
///
/// # Panics
/// If the test fails in its own process; the message has all that it printed.
#[must_use]
pub fn alone() -> bool {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("main");
    // A runner that uses one thread calls tests on its main thread: they are alone already.
    if name == "main" || std::env::var_os(MARK).is_some() {
        return true;
    }
    let binary = std::env::current_exe().expect("the path of this test");
    let output = Command::new(binary)
        .args(["--exact", name, "--include-ignored", "--nocapture"])
        .arg("--test-threads=1")
        .env(MARK, "1")
        .stdin(Stdio::null())
        .output()
        .expect("this test can be run again");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name}, alone: {}\n{text}{errors}",
        output.status
    );
    for line in errors.lines() {
        if line.starts_with(UNMEASURED) {
            print_past_capture(line);
        } else {
            // Measurements, shown with `--nocapture`.
            eprintln!("{line}");
        }
    }
    false
}
