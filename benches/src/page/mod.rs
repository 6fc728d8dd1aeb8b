//! A report as one page with charts: without scripts, and without anything to fetch.

mod chart;

use std::fmt::Write;

use crate::report::{Report, Row};
use chart::Series;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child,.text{text-align:left}.charts{display:flex;flex-wrap:wrap;gap:1.5rem}\
figure{margin:0}figcaption{font-weight:600}svg text{font:11px system-ui,sans-serif;fill:#444}.note{color:#a00}";

/// Below so many samples, a distribution shows nothing that the table does not.
const LEAST: usize = 5;

/// The page, as HTML.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut html =
        String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    let _ = write!(
        html,
        "<title>vmm-bench</title><style>{STYLE}</style></head><body><h1>vmm-bench</h1>\n{}",
        environment(report)
    );
    for scenario in scenarios(report) {
        let rows: Vec<&Row> = report
            .results
            .iter()
            .filter(|row| row.scenario == scenario)
            .collect();
        let _ = write!(html, "<h2>{}</h2>\n{}", escape(scenario), table(&rows));
        html.push_str("<div class=\"charts\">\n");
        html.push_str(&medians(&rows));
        html.push_str(&distributions(&rows));
        html.push_str("</div>\n");
    }
    html.push_str(&growth(report));
    html.push_str(&ratios(report));
    html.push_str(&targets(report));
    html.push_str("</body></html>\n");
    html
}

fn environment(report: &Report) -> String {
    let env = &report.env;
    let ring0 = match env.profile {
        hearth_vmm::CpuProfile::Native => "run by the processor",
        hearth_vmm::CpuProfile::Emulated => "emulated by KVM (not hardware KVM)",
    };
    format!(
        "<p>{} × {}, Linux {}; guests' kernel mode {ring0}; governor {}; load {:.1} at the start; vmm-bench {}, {}.</p>\n",
        env.cpus,
        escape(&env.cpu),
        escape(&env.kernel),
        if env.governor.is_empty() {
            "unknown".into()
        } else {
            escape(&env.governor)
        },
        env.load,
        escape(&env.version),
        escape(&env.date)
    )
}

/// Returns the scenarios in the order of their first result.
fn scenarios(report: &Report) -> Vec<&str> {
    let mut seen = Vec::new();
    for row in &report.results {
        if !seen.contains(&row.scenario.as_str()) {
            seen.push(row.scenario.as_str());
        }
    }
    seen
}

fn table(rows: &[&Row]) -> String {
    let mut html = String::from(
        "<table><tr><th>metric</th><th class=\"text\">side</th><th>n</th><th>min</th><th>p50</th>\
         <th>p95</th><th>p99</th><th>max</th><th class=\"text\">unit</th></tr>\n",
    );
    for row in rows {
        let s = &row.summary;
        let _ = write!(
            html,
            "<tr><td>{}</td><td class=\"text\">{}</td><td>{}</td>",
            escape(&row.metric),
            escape(&row.side),
            s.n
        );
        for value in [s.min, s.p50, s.p95, s.p99, s.max] {
            let _ = write!(html, "<td>{}</td>", chart::figure(value));
        }
        let _ = writeln!(html, "<td class=\"text\">{}</td></tr>", escape(&row.unit));
    }
    html + "</table>\n"
}

/// Draws a chart of medians for each unit that several rows share.
fn medians(rows: &[&Row]) -> String {
    let mut html = String::new();
    let mut units: Vec<&str> = rows.iter().map(|row| row.unit.as_str()).collect();
    units.sort_unstable();
    units.dedup();
    for unit in units {
        let bars: Vec<(String, f64)> = rows
            .iter()
            .filter(|row| row.unit == unit)
            .map(|row| (format!("{} ({})", row.metric, row.side), row.summary.p50))
            .collect();
        if bars.len() > 1 {
            html.push_str(&captioned("medians", unit, &chart::bars(&bars)));
        }
    }
    html
}

/// Draws a chart for each metric: its cumulative distribution, a line for each side.
fn distributions(rows: &[&Row]) -> String {
    let mut html = String::new();
    let mut done: Vec<(&str, &str)> = Vec::new();
    for row in rows {
        let key = (row.metric.as_str(), row.unit.as_str());
        if row.samples.len() < LEAST || done.contains(&key) {
            continue;
        }
        done.push(key);
        let series: Vec<Series<'_>> = rows
            .iter()
            .filter(|other| (other.metric.as_str(), other.unit.as_str()) == key)
            .map(|row| Series {
                name: &row.side,
                samples: &row.samples,
            })
            .collect();
        let first = row.samples.first();
        let mut all = series.iter().flat_map(|side| side.samples);
        // If all samples are equal, the table tells everything.
        if all.any(|sample| Some(sample) != first) {
            html.push_str(&captioned(&row.metric, &row.unit, &chart::cdf(&series)));
        }
    }
    html
}

fn captioned(title: &str, unit: &str, svg: &str) -> String {
    let unit = match unit {
        "" => String::new(),
        unit => format!(" ({})", escape(unit)),
    };
    format!(
        "<figure><figcaption>{}{unit}</figcaption>{svg}</figure>\n",
        escape(title)
    )
}

/// Charts how metrics grow with the swept parameter: medians, and the line through them.
fn growth(report: &Report) -> String {
    if report.fits.is_empty() {
        return String::new();
    }
    let mut html = String::from("<h2>Growth</h2><div class=\"charts\">\n");
    for fit in &report.fits {
        let title = format!("{} {} ({})", fit.scenario, fit.metric, fit.side);
        let unit = format!("{} by {}", fit.unit, fit.per);
        let svg = chart::line(&fit.points, fit.base, fit.slope);
        html.push_str(&captioned(&title, &unit, &svg));
    }
    html.push_str("</div>\n<ul>\n");
    for fit in &report.fits {
        let _ = writeln!(html, "<li>{}</li>", escape(&fit.to_string()));
    }
    html + "</ul>\n"
}

/// Lists the figures beside their targets.
fn targets(report: &Report) -> String {
    let mut html = String::new();
    if !report.targets.is_empty() {
        html.push_str("<h2>Targets</h2><ul>\n");
        for target in &report.targets {
            let class = if target.is_met() {
                ""
            } else {
                " class=\"note\""
            };
            let _ = writeln!(html, "<li{class}>{}</li>", escape(&target.to_string()));
        }
        html.push_str("</ul>\n");
    }
    html
}

fn ratios(report: &Report) -> String {
    let mut html = String::new();
    if !report.ratios.is_empty() {
        html.push_str(
            "<h2>Ratios of medians</h2><table><tr><th>metric</th><th class=\"text\">sides</th>\
             <th>ratio</th><th>95 % from</th><th>to</th><th>n</th></tr>\n",
        );
        for row in &report.ratios {
            let [low, high] = row.ratio.ci95;
            let _ = writeln!(
                html,
                "<tr><td>{}</td><td class=\"text\">{} / {}</td><td>{:.3}</td><td>{low:.3}</td>\
                 <td>{high:.3}</td><td>{}</td></tr>",
                escape(&row.metric),
                escape(&row.a),
                escape(&row.b),
                row.ratio.ratio,
                row.ratio.n
            );
        }
        html.push_str("</table>\n");
    }
    for note in &report.notes {
        let _ = writeln!(html, "<p>Note: {}</p>", escape(note));
    }
    for why in &report.not_measured {
        let _ = writeln!(html, "<p class=\"note\">NOT MEASURED: {}</p>", escape(why));
    }
    html
}

/// Escapes text for HTML: a report is a file, and may contain anything.
fn escape(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            c => html.push(c),
        }
    }
    html
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::tests::report;

    fn sample() -> Report {
        let mut report = report();
        let side = |scale: f64| (1..=30).map(|i| scale * f64::from(i)).collect::<Vec<_>>();
        report.add("fork", "first exit", "us", "hearth", side(1.0));
        report.add("fork", "first exit", "us", "floor", side(0.9));
        report.add(
            "fork",
            "<script>alert(1)</script>",
            "us",
            "hearth",
            side(2.0),
        );
        report.compare("first exit", "hearth", "floor");
        report.compare("first exit", "hearth", "firecracker");
        report
    }

    #[test]
    fn everything_measured_is_on_the_page_and_what_was_not_is_said() {
        let html = page(&sample());
        // Medians of the three rows, and one distribution for each of two metrics.
        assert_eq!(html.matches("<svg").count(), 3);
        assert_eq!(html.matches("<polyline").count(), 3);
        assert!(html.contains("hearth / floor"));
        assert!(html.contains("NOT MEASURED: first exit: hearth / firecracker"));
    }

    #[test]
    fn growth_and_targets_are_on_the_page() {
        let mut report = sample();
        let sweep: crate::sweep::Sweep = "memory=128,256,512".parse().unwrap();
        let scenario = |report: &mut Report, point: crate::sweep::Point| {
            let mib = f64::from(point.shape.memory_mib);
            report.add("s", "grows", "us", "hearth", vec![mib; 12]);
            Ok::<(), std::convert::Infallible>(())
        };
        sweep.run(&mut report, scenario).unwrap();
        let bound = crate::target::Bound::AtMost(1.0);
        report.expect("nothing", "hearth", crate::target::Statistic::P50, bound);
        let html = page(&report);
        assert_eq!(html.matches("<circle").count(), 3);
        assert!(html.contains("us by MiB"));
        assert!(html.contains("<li class=\"note\">target NOT MEASURED: nothing"));
    }

    #[test]
    fn what_a_file_says_stays_text_and_nothing_is_fetched() {
        let html = page(&sample());
        assert!(!html.contains("<script"));
        assert!(html.contains("&lt;script&gt;"));
        let html = html.replace("http://www.w3.org/2000/svg", "");
        assert!(!html.contains("http"));
    }

    #[test]
    fn odd_samples_give_charts_without_odd_numbers() {
        let mut report = report();
        report.add("x", "zeros", "us", "hearth", vec![0.0; 5]);
        report.add("x", "one", "us", "hearth", vec![7.0]);
        report.add("x", "wide", "us", "hearth", vec![0.0, 1e-9, 1e12]);
        let html = page(&report);
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
    }
}
