//! The table of figures in a document, made from one run's results.

use std::fmt::Write;

use crate::report::{Report, figure};

/// The table stands between these lines.
const BEGIN: &str = "<!-- figures: begin (`make bench` writes what follows) -->";
const END: &str = "<!-- figures: end -->";

/// Names of the metric beside QEMU, of which a run has one: QEMU's agent uses vsock or a serial
/// line, depending on the host.
const BESIDE_QEMU: &str = "cold boot to pong, over vsock|cold boot to pong, with a serial line";

/// Scenario, metric (or alternatives, separated by `|`), side, and the name in the table.
const ROWS: [[&str; 4]; 23] = [
    [
        "floor",
        "fork to first instruction",
        "floor",
        "fork by bare ioctls, to the first instruction",
    ],
    [
        "fork",
        "fork to first instruction",
        "hearth",
        "fork of a template, to the first instruction",
    ],
    [
        "boot",
        "create (to the first KVM_RUN)",
        "hearth",
        "cold boot: all that the host does before it",
    ],
    [
        "boot",
        "cold boot to pong",
        "hearth",
        "cold boot, to the agent's pong",
    ],
    [
        "peers",
        BESIDE_QEMU,
        "hearth",
        "cold boot in turns with QEMU, to the pong",
    ],
    [
        "peers",
        BESIDE_QEMU,
        "qemu",
        "QEMU, the same files and words, to the pong",
    ],
    [
        "fork",
        "fork to pong",
        "hearth",
        "fork, to the agent's pong",
    ],
    [
        "handoff",
        "acquire on a full pool",
        "paused",
        "hand-off of a parked guest",
    ],
    [
        "handoff",
        "acquire after 5 ms of rest",
        "paused",
        "hand-off, 5 ms after anything happened",
    ],
    [
        "handoff",
        "acquire",
        "refilling",
        "hand-off while the pool refills",
    ],
    [
        "handoff",
        "acquire to first pong",
        "paused",
        "hand-off, to the guest's pong",
    ],
    [
        "exec",
        "hand-off to its result",
        "hearth",
        "hand-off, to the result of a plain program",
    ],
    [
        "exec",
        "hand-off to print(6 * 7)",
        "python",
        "hand-off, to the result of `print(6 * 7)` in warm Python",
    ],
    [
        "exec",
        "hand-off to print(6 * 7)",
        "javascript",
        "the same in warm JavaScript",
    ],
    [
        "exec",
        "cold boot to print(6 * 7)",
        "python",
        "cold boot, to the result of `print(6 * 7)` in Python",
    ],
    ["ping", "ping", "hearth", "ping on an open connection"],
    [
        "ping",
        "ping on a fresh connection",
        "hearth",
        "ping on a fresh connection",
    ],
    ["refill", "refill", "hearth", "refill of an emptied pool"],
    [
        "density",
        "private memory",
        "hearth",
        "private memory of a parked clone of 128 MiB",
    ],
    [
        "churn",
        "fork, run and destroy",
        "hearth",
        "forked, run to the first instruction, destroyed",
    ],
    [
        "vsock",
        "1 MiB to the guest",
        "hearth",
        "vsock, 1 MiB to the guest",
    ],
    [
        "vsock",
        "1 MiB from the guest",
        "hearth",
        "vsock, 1 MiB from the guest",
    ],
    [
        "idle",
        "whole process",
        "paused",
        "20 parked guests at rest",
    ],
];

/// Returns the document with its table replaced by that of the report; `None` if it has no place
/// for one.
#[must_use]
pub fn replaced(document: &str, report: &Report) -> Option<String> {
    between(document, [BEGIN, END], &table(report))
}

/// Returns the document with `text` between these lines; `None` if it has no such lines.
pub(crate) fn between(document: &str, lines: [&str; 2], text: &str) -> Option<String> {
    let [begin, end] = lines;
    let (before, rest) = document.split_once(begin)?;
    let (_, after) = rest.split_once(end)?;
    Some(format!("{before}{begin}\n{text}\n{end}{after}"))
}

/// The table as Markdown, with the machine and the day.
#[must_use]
pub fn table(report: &Report) -> String {
    let env = &report.env;
    let kind = match env.profile {
        hearth_vmm::CpuProfile::Native => "the guests' kernel mode runs on the processor",
        hearth_vmm::CpuProfile::Emulated => {
            "**the guests' kernel mode is emulated**, about a thousand times slower than on hardware KVM; there is no \
             figure of hardware KVM here, which was tested as QEMU emulates it, and not on silicon"
        }
    };
    let mut text = format!(
        "`vmm-bench {}` on {}, {} x {}, Linux {}, load {:.1} at the start; {kind}.\n\n\
         | | p50 | p99 | unit | n |\n|---|--:|--:|---|--:|\n",
        env.version,
        if env.date.is_empty() {
            "an unknown day"
        } else {
            &env.date
        },
        env.cpus,
        env.cpu,
        env.kernel,
        env.load
    );
    for [scenario, metric, side, name] in ROWS {
        let mut rows = report.results.iter();
        let found = rows.find(|row| {
            [&row.scenario, &row.side] == [scenario, side]
                && metric.split('|').any(|m| m == row.metric)
        });
        let _ = match found {
            Some(row) => writeln!(
                text,
                "| {name} | {} | {} | {} | {} |",
                figure(row.summary.p50),
                figure(row.summary.p99),
                row.unit,
                row.summary.n
            ),
            None => writeln!(text, "| {name} | NOT MEASURED | | | |"),
        };
    }
    for row in &report.ratios {
        let [low, high] = row.ratio.ci95;
        let _ = writeln!(
            text,
            "| {}: {} over {} | {:.3} | | 95 % {low:.3} to {high:.3} | {} |",
            row.metric, row.a, row.b, row.ratio.ratio, row.ratio.n
        );
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    #[test]
    fn a_document_keeps_all_but_its_table() {
        let mut report = report();
        report.add("boot", "cold boot to pong", "us", "hearth", vec![5e6; 12]);
        let document = format!("before\n{BEGIN}\nstale\n{END}\nafter\n");
        let once = replaced(&document, &report).unwrap();
        assert!(once.starts_with("before\n") && once.ends_with("after\n"));
        assert!(!once.contains("stale"));
        assert!(
            once.contains("| cold boot, to the agent's pong | 5000000.0 | 5000000.0 | us | 12 |"),
            "{once}"
        );
        assert_eq!(once.matches("NOT MEASURED").count(), ROWS.len() - 1);
        assert_eq!(replaced(&once, &report), Some(once), "the same again");
        assert_eq!(replaced("no place", &report), None);
    }

    #[test]
    fn emulation_is_said() {
        let mut report = report();
        assert!(!table(&report).contains("emulated"));
        report.env.profile = hearth_vmm::CpuProfile::Emulated;
        assert!(table(&report).contains("not on silicon"));
    }
}
