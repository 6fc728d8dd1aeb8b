//! Results of a counting run: as lines of a baseline, and as a table in a document.

use std::fmt::Write;

use crate::figures::between;
use crate::report::{Report, Row, figure};
use crate::scenario::count::{BUSY, IDLE, SCENARIO};

/// The table stands between these lines.
const LINES: [&str; 2] = [
    "<!-- counts: begin (`vmm-bench figures` writes what follows of a counting run) -->",
    "<!-- counts: end -->",
];

fn rows<'a>(report: &'a Report, unit: &'static str) -> impl Iterator<Item = &'a Row> {
    let is_such = move |row: &&Row| row.scenario == SCENARIO && row.unit == unit;
    report.results.iter().filter(is_such)
}

/// Whether the report is of a counting run.
#[must_use]
pub fn is_of(report: &Report) -> bool {
    rows(report, BUSY).next().is_some()
}

/// Returns the medians of the instructions that ran, in thousands: a line each, a name and a
/// number.
#[must_use]
pub fn lines(report: &Report) -> String {
    let ours = rows(report, BUSY).filter(|row| row.side == "hearth");
    ours.fold(String::new(), |mut text, row| {
        let words = row.metric.split(|c: char| !c.is_ascii_alphanumeric());
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        let _ = writeln!(text, "{} {:.0}", words.join("-"), row.summary.p50 * 1e3);
        text
    })
}

/// Returns the document with its table replaced by that of the report; `None` if it has no place
/// for one.
#[must_use]
pub fn replaced(document: &str, report: &Report) -> Option<String> {
    between(document, LINES, &table(report))
}

/// The table as Markdown, with the machine and the day.
fn table(report: &Report) -> String {
    let env = &report.env;
    let mut text = format!(
        "`vmm-bench count` {} on {}: Linux {} on AMD-V with one processor, both emulated by QEMU, whose clock counts instructions. \
         In millions, of host kernel, KVM and guest together; p50.\n\n\
         | | ran | waited | n |\n|---|--:|--:|--:|\n",
        env.version, env.date, env.kernel
    );
    for row in rows(report, BUSY) {
        let mut idle = rows(report, IDLE);
        let idle = idle.find(|idle| [&idle.metric, &idle.side] == [&row.metric, &row.side]);
        let idle = idle.map_or_else(String::new, |row| figure(row.summary.p50));
        let side = match row.side.as_str() {
            "hearth" => String::new(),
            other => format!(" ({other})"),
        };
        let (name, ran, n) = (&row.metric, figure(row.summary.p50), row.summary.n);
        let _ = writeln!(text, "| {name}{side} | {ran} | {idle} | {n} |");
    }
    text.push_str("\n| of these | | unit |\n|---|--:|---|\n");
    let is_part = |row: &&Row| row.scenario == SCENARIO && ![BUSY, IDLE].contains(&&*row.unit);
    for row in report.results.iter().filter(is_part) {
        let (name, value, unit) = (&row.metric, figure(row.summary.p50), &row.unit);
        let _ = writeln!(text, "| {name} | {value} | {unit} |");
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    fn counted() -> Report {
        let mut report = report();
        report.add(SCENARIO, "exec of `true`", BUSY, "hearth", vec![1.2345; 10]);
        report.add(SCENARIO, "exec of `true`", IDLE, "hearth", vec![2.0; 10]);
        report.add(SCENARIO, "exec of `true`", BUSY, "floor", vec![9.0; 10]);
        report.add(SCENARIO, "exec: made", "M", "hearth", vec![0.5; 10]);
        report
    }

    #[test]
    fn a_line_has_a_name_of_one_word_and_thousands_of_our_side() {
        assert_eq!(lines(&counted()), "exec-of-true 1234\n");
    }

    #[test]
    fn what_ran_and_what_was_waited_for_stand_side_by_side() {
        let [begin, end] = LINES;
        let document = format!("before\n{begin}\nstale\n{end}\nafter");
        let text = replaced(&document, &counted()).unwrap();
        assert!(
            text.contains("| exec of `true` | 1.23 | 2.00 | 10 |"),
            "{text}"
        );
        assert!(text.contains("| exec of `true` (floor) | 9.00 |  | 10 |"));
        assert!(text.contains("| exec: made | 0.500 | M |"));
        assert!(text.starts_with("before\n") && text.ends_with("\nafter"));
        assert_eq!(replaced("no place", &counted()), None);
        assert!(is_of(&counted()) && !is_of(&report()));
    }
}
