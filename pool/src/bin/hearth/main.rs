//! The `hearth` command: a thin layer over the libraries, one file for each subcommand.
//!
//! Exit codes: `run` and `shell` return that of the guest's program, `boot` and `doctor` have codes
//! of their own, and every error of the command itself is [`FAILED`].

mod boot;
mod console;
mod doctor;
mod failure;
mod guest;
mod image;
mod machine;
mod pool;
mod progress;
mod run;
mod runtime;
mod shell;
mod signals;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::FromEnvError;

use crate::failure::failed;

/// Exit code for errors of the command itself, wrong usage included; `env` and container runtimes
/// use the same.
const FAILED: u8 = 125;
/// Exit code when a time limit ended the program; `timeout` uses the same.
const TIMED_OUT: u8 = 124;
/// Environment variable with the log filter, such as `debug` or `hearth_vmm=trace`.
const LOG_VARIABLE: &str = "HEARTH_LOG";

/// Runs programs in microVMs: each in a Linux guest of its own, on KVM.
///
/// Begin with `hearth doctor`, which says whether this machine can run guests and what to do if it
/// cannot. Then `hearth run -- echo hello`.
#[derive(Debug, Parser)]
#[command(name = "hearth", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    Doctor(doctor::Args),
    #[command(subcommand)]
    Image(image::Command),
    Run(run::Args),
    Shell(shell::Args),
    Pool(pool::Args),
    Boot(boot::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // If this fails, there is no terminal to report it on.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    if let Err(error) = log() {
        return failed(&error);
    }
    // The doctor writes no files, and reports every limit.
    let is_doctor = matches!(cli.command, Subcommands::Doctor(_));
    if let (false, Err(error)) = (is_doctor, runtime::outlive_the_file_limit()) {
        return failed(&error);
    }
    match cli.command {
        Subcommands::Doctor(args) => doctor::doctor(&args),
        Subcommands::Image(command) => image::image(&command),
        Subcommands::Run(args) => run::run(&args),
        Subcommands::Shell(args) => shell::shell(&args),
        Subcommands::Pool(args) => pool::pool(&args),
        Subcommands::Boot(args) => boot::boot(&args),
    }
}

/// Sends logs to stderr; the level is `warn` unless `HEARTH_LOG` is set.
fn log() -> Result<(), LogError> {
    let filter = match std::env::var_os(LOG_VARIABLE) {
        None => EnvFilter::new("warn"),
        Some(_) => EnvFilter::try_from_env(LOG_VARIABLE)?,
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// The log filter cannot be parsed.
#[derive(Debug, thiserror::Error)]
#[error("HEARTH_LOG is no log filter: give a level such as debug, or hearth_vmm=trace")]
struct LogError(#[from] FromEnvError);

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
