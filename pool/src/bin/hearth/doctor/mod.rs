//! `hearth doctor`: checks whether this machine can run guests, and says what to do if not.

mod images;
mod kvm;
mod limits;
mod user;

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use serde::Serialize;

use crate::failure::failed;

/// Says whether this machine can run guests, and what to do about each thing that is missing
///
/// Changes nothing. The exit code is 0 if guests can run and 1 if not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Prints one JSON object instead
    #[arg(long)]
    json: bool,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// Nothing is wrong.
    Ok,
    /// Guests run, but not as many or not as well as they could.
    Warn,
    /// Guests do not run.
    Fail,
}

/// One check and its result.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            verdict: Verdict::Warn,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Fail,
            ..Self::warn(name, found, advice)
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    can_run_guests: bool,
    checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION"),
            can_run_guests: checks.iter().all(|check| check.verdict != Verdict::Fail),
            checks,
        }
    }
}

pub(crate) fn doctor(args: &Args) -> ExitCode {
    let checks = kvm::checks()
        .into_iter()
        .chain(user::checks())
        .chain(limits::checks())
        .chain(images::checks())
        .collect();
    let report = Report::new(checks);
    let text = if args.json {
        match serde_json::to_string_pretty(&report) {
            Ok(text) => text + "\n",
            Err(error) => return failed(&error),
        }
    } else {
        table(&report)
    };
    // A closed stdout (the reader has stopped reading) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    ExitCode::from(u8::from(!report.can_run_guests))
}

fn table(report: &Report) -> String {
    let mut text = format!("hearth {}\n", report.version);
    for check in &report.checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "FAIL",
        };
        let (name, found) = (check.name, &check.found);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{verdict:>4}  {name:<10} {found}");
        if let Some(advice) = &check.advice {
            let _ = writeln!(text, "{:>17}{advice}", "-> ");
        }
    }
    text.push_str(if report.can_run_guests {
        "This machine can run guests. Try: hearth run -- echo hello\n"
    } else {
        "This machine cannot run guests yet; see FAIL above.\n"
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_does_not_stop_guests_but_a_failure_does() {
        let warn = || Check::warn("a", "b", "c");
        assert!(Report::new(vec![Check::ok("a", "b"), warn()]).can_run_guests);
        assert!(!Report::new(vec![warn(), Check::fail("a", "b", "c")]).can_run_guests);
    }
}
