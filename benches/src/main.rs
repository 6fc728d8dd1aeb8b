//! `vmm-bench`: see `vmm-bench --help`.

mod arguments;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use arguments::{Cli, Count, Scenario};
use clap::Parser;
use hearth_bench::compare::Comparison;
use hearth_bench::environment::Environment;
use hearth_bench::page::page;
use hearth_bench::report::{Report, SCHEMA};
use hearth_bench::scenario::boot::Files;
use hearth_bench::scenario::count::Subjects;
use hearth_bench::scenario::languages::{self, Rounds};
use hearth_bench::scenario::{
    ScenarioError, balloon, boot, churn, count, density, exec, fork, handoff, idle, peers, ping,
    refill, replace, vsock,
};
use hearth_bench::suite::{self, Effort, chain};
use hearth_bench::sweep::Point;
use hearth_bench::{counts, figures};

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("vmm-bench: {}", chain(&*error));
            // A comparison exits with 1.
            ExitCode::from(2)
        }
    }
}

fn read(path: &Path) -> Result<Report, Box<dyn Error>> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| named(&e))?;
    let report: Report = serde_json::from_str(&text).map_err(|e| named(&e))?;
    if report.schema != SCHEMA {
        let other = report.schema;
        return Err(named(&format!("format {other}; this program reads {SCHEMA}")).into());
    }
    Ok(report)
}

fn run(cli: &Cli) -> Result<ExitCode, Box<dyn Error>> {
    match &cli.scenario {
        Scenario::Report { results, output } => {
            std::fs::write(output, page(&read(results)?))?;
            println!("{}", output.display());
            return Ok(ExitCode::SUCCESS);
        }
        Scenario::Figures { results, document } => {
            let text = std::fs::read_to_string(document)?;
            let report = read(results)?;
            let text = match counts::is_of(&report) {
                true => counts::replaced(&text, &report),
                false => figures::replaced(&text, &report),
            };
            let text = text.ok_or("the document has no place for figures")?;
            std::fs::write(document, text)?;
            return Ok(ExitCode::SUCCESS);
        }
        Scenario::Show { results } => {
            print!("{}", read(results)?);
            return Ok(ExitCode::SUCCESS);
        }
        Scenario::Counts { results } => {
            print!("{}", counts::lines(&read(results)?));
            return Ok(ExitCode::SUCCESS);
        }
        Scenario::Compare { old, new } => {
            let comparison = Comparison::of(&read(old)?, &read(new)?);
            print!("{comparison}");
            return Ok(ExitCode::from(u8::from(comparison.worse())));
        }
        _ => {}
    }
    let mut report = Report::new(Environment::here()?);
    match &cli.sweep {
        None => measure(&cli.scenario, &mut report, Point::default())?,
        Some(sweep) if cli.scenario.keys().contains(&sweep.key) => {
            let each = |report: &mut Report, point| measure(&cli.scenario, report, point);
            sweep.run(&mut report, each)?;
        }
        Some(_) => return Err("this scenario has no such size to sweep; see --help".into()),
    }
    if let Scenario::All { output, .. } = &cli.scenario {
        std::fs::create_dir_all(output)?;
        let (results, charts) = (output.join("results.json"), output.join("report.html"));
        std::fs::write(&results, serde_json::to_string(&report)?)?;
        std::fs::write(&charts, page(&report))?;
        eprintln!("{} and {}", results.display(), charts.display());
    }
    if cli.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(u8::from(cli.check && report.misses())))
}

/// Runs one scenario at one size.
fn measure(scenario: &Scenario, report: &mut Report, point: Point) -> Result<(), Box<dyn Error>> {
    // Scenarios without a guest need no image.
    let (kernel, initramfs) = match scenario.image() {
        Some(image) => image.files()?,
        None => Default::default(),
    };
    let files = Files {
        kernel: &kernel,
        initramfs: &initramfs,
        shape: point.shape,
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let measured = run_scenario(scenario, report, files, point.guests);
    Ok(runtime.enable_all().build()?.block_on(measured)?)
}

async fn run_scenario(
    scenario: &Scenario,
    report: &mut Report,
    files: Files<'_>,
    guests: Option<usize>,
) -> Result<(), ScenarioError> {
    match *scenario {
        Scenario::Report { .. } | Scenario::Figures { .. } | Scenario::Compare { .. } => Ok(()),
        Scenario::Show { .. } | Scenario::Counts { .. } => Ok(()),
        Scenario::All {
            quick, ref peers, ..
        } => {
            let effort = if quick { Effort::Quick } else { Effort::Full };
            suite::run(report, files, &peers.peers(), effort, |line| {
                eprintln!("{line}")
            })
            .await;
            Ok(())
        }
        Scenario::Floor(Count { n }) => fork::floor_only(report, n),
        Scenario::Fork(Count { n }) => fork::beside_floor(report, n).await,
        Scenario::Churn { n } => churn::run(report, files.shape, n).await,
        Scenario::Count {
            n,
            python,
            ref peers,
            ..
        } => {
            let peers = peers.peers();
            let subjects = Subjects { python, peers };
            count::run(report, files, &subjects, n, |line| eprintln!("{line}")).await
        }
        Scenario::Boot { n, forks, .. } => boot::run(report, files, n, forks).await,
        Scenario::Peers { n, ref peers, .. } => peers::run(report, files, &peers.peers(), n).await,
        Scenario::Ping { n, .. } => ping::run(report, files, n).await,
        Scenario::Handoff { ref count, .. } => handoff::run(report, files, count.n).await,
        Scenario::Exec {
            n: warm,
            cold,
            ref languages,
            ref peers,
            ..
        } => {
            exec::run(report, files, warm).await?;
            let rounds = Rounds { warm, cold };
            languages::run(report, files, languages, rounds, &peers.peers()).await;
            Ok(())
        }
        Scenario::Refill { n, forks, .. } => refill::run(report, files, n, forks).await,
        Scenario::Replace { n, .. } => replace::run(report, files, n).await,
        Scenario::Density { n, .. } => density::run(report, files, guests.unwrap_or(n)).await,
        Scenario::Vsock { n, .. } => vsock::run(report, files, n).await,
        Scenario::Balloon { n, touches, .. } => balloon::run(report, files, n, touches).await,
        Scenario::Idle { n, seconds, .. } => {
            let time = Duration::from_secs(seconds);
            idle::run(report, files, guests.unwrap_or(n), time).await
        }
    }
}
