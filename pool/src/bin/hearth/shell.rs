//! `hearth shell`: a shell in a guest of its own, on this terminal.

use std::ffi::OsString;
use std::process::ExitCode;

use hearth_agent::Command;
use hearth_agent::client::ExecError;
use hearth_agent::proto::{Exited, SpawnFailure};

use crate::failure::chain;
use crate::guest::{self, Job, Report, RunError, terminal};

/// Opens a shell in a fresh guest, on this terminal
///
/// The guest lives as long as the shell, whose exit code becomes this command's. All keys go to the
/// shell, Ctrl-C included; the terminal's size follows the window. The base image has no shell:
/// choose another (--image shell), or a root file system that has /bin/sh (--root), or name a
/// program to run instead.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(flatten)]
    guest: guest::Options,
    /// The program to run instead of /bin/sh, and its arguments
    #[arg(last = true, value_name = "ARGV")]
    argv: Vec<OsString>,
}

const EXIT_CODES: &str = "\
Exit codes:
  that of the shell; 128 and the signal's number if a signal ended it
  125  the shell's end is not known: the guest did not start, or ended before it; a file could not
       be copied; stdin is no terminal; or wrong usage
  126  the guest has the program, but cannot execute it
  127  the guest has no such program
  129, 130, 131, 143  the guest was ended by SIGHUP, SIGINT, SIGQUIT, SIGTERM";

pub(crate) fn shell(args: &Args) -> ExitCode {
    let result = open(args);
    if let Err(error) = &result {
        eprintln!("hearth: {}", chain(error));
    }
    ExitCode::from(guest::exit_code(&result))
}

fn open(args: &Args) -> Result<Exited, RunError> {
    if !terminal::is_there() {
        return Err(RunError::NoTerminal);
    }
    let command = match args.argv.split_first() {
        Some((program, rest)) => Command::new(program).args(rest),
        None if args.guest.is_bare() => return Err(RunError::NoShell),
        None => Command::new("/bin/sh"),
    };
    let job = Job {
        code: None,
        image: None,
        command: command.env("TERM", std::env::var_os("TERM").unwrap_or("xterm".into())),
        timeout: None,
        on_terminal: true,
        count_instructions: false,
    };
    match guest::run(&args.guest, job, &mut Report::default()) {
        Err(RunError::Exec(ExecError::Failed(SpawnFailure::NotFound { .. })))
            if args.argv.is_empty() =>
        {
            Err(RunError::NoShell)
        }
        other => other,
    }
}
