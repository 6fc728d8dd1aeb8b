//! `hearth run`: one program in one guest, with this process's streams and the program's exit code.

mod code;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use hearth_agent::Command;
use hearth_agent::proto::Input;

use self::code::Language;
use crate::failure::chain;
use crate::guest::{self, Job, Report, RunError};
use crate::machine::seconds;

/// Runs one program, or code, in a fresh guest
///
/// hearth run -- echo hello                     a program of the guest
/// hearth run --lang python 'print(6 * 7)'      code; without it, stdin is the code
/// hearth run script.js -- argument             a file with code, by its name: .py, .js, .sh
///
/// The guest's program gets this command's stdin, stdout, stderr, and gives its exit code. Ctrl-C
/// and SIGTERM are passed on to the program; the second one ends the guest. The base image holds
/// small built-in programs only: cat echo env exit false id ls pwd sleep true uname. For others
/// choose an image (--image), give the guest a root file system of yours (--root), or a program
/// (--copy-in).
///
/// The first run builds the guest's kernel, which takes minutes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXIT_CODES, verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    guest: guest::Options,
    /// Ends the program after so many seconds (SIGTERM, 2 s later SIGKILL); exit code 124
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Prints one line of JSON to stderr, after all else, with the time of each phase in
    /// microseconds
    #[arg(long)]
    json: bool,
    /// Language of the code
    #[arg(long, value_name = "LANGUAGE", value_enum)]
    lang: Option<Language>,
    /// With --lang the code itself, or - for stdin; else a file with code
    #[arg(value_name = "CODE|FILE")]
    code: Option<OsString>,
    /// The program and its arguments; after code or a file, arguments for that
    #[arg(last = true, value_name = "ARGV")]
    argv: Vec<OsString>,
}

const EXIT_CODES: &str = "\
Exit codes:
  that of the program; 128 and the signal's number if a signal ended it
  124  --timeout ended the program
  125  the program's end is not known: the guest did not start, or ended before it; a file could not
       be copied; or wrong usage
  126  the guest has the program, but cannot execute it
  127  the guest has no such program
  129, 130, 131, 143  the guest was ended by SIGHUP, Ctrl-C, SIGQUIT, SIGTERM

Phases (--json, phases_us): host_probe, once per process, then image (found or built, read), create
(up to the first KVM_RUN), boot (to the start of the agent), agent_ready (to its greeting on the host),
copy_in, exec (request to exit status), copy_out.";

pub(crate) fn run(args: &Args) -> ExitCode {
    let mut report = Report::default();
    let result = job(args).and_then(|job| guest::run(&args.guest, job, &mut report));
    let code = guest::exit_code(&result);
    if let Err(error) = &result {
        let text = chain(error);
        eprintln!("hearth: {text}");
        report.error = Some(text);
    }
    if args.json {
        report.exit_code = code;
        eprintln!("{}", report.line());
    }
    ExitCode::from(code)
}

fn job(args: &Args) -> Result<Job, RunError> {
    let (mut command, code, image) = match (args.lang, &args.code, args.argv.split_first()) {
        (None, None, Some((program, rest))) => {
            let command = Command::new(program).args(rest).stdin(Input::Pipe);
            (command, None, None)
        }
        (language, text, _) => {
            let found = code::find(language, text.as_ref(), &args.argv)?;
            let stdin = match found.stdin_is_free {
                true => Input::Pipe,
                false => Input::Null,
            };
            let image = found.code.image;
            (found.command.stdin(stdin), Some(found.code), Some(image))
        }
    };
    if let Some(timeout) = args.timeout {
        command = command.timeout(timeout);
    }
    Ok(Job {
        command,
        code,
        image,
        timeout: args.timeout,
        on_terminal: false,
        count_instructions: args.json,
    })
}
