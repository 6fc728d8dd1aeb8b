//! Runs the programs of a build. All programs are started here. They are searched for in absolute
//! directories only, with an environment of selected variables, outside of the caller's directory
//! and without a terminal. The end of their output is kept for errors.

mod tied;

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitStatus, Stdio};

/// The search path if `PATH` has no absolute directory.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Additional variables for programs that fetch: how this machine reaches the network, and which
/// certificates it trusts.
const NETWORK: [&str; 13] = [
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
];

/// The number of last lines in an error, and the maximum length of a line.
const TAIL_LINES: usize = 30;
const LINE_BYTES: u64 = 4096;

/// Why a program of the build failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The program could not be started.
    #[error("cannot run {program}: is it installed?")]
    Start {
        /// The program's name.
        program: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The program ran and failed.
    #[error("{program} failed ({status}); its last output:\n{tail}")]
    Failed {
        /// The program and its first arguments.
        program: String,
        /// The exit status.
        status: ExitStatus,
        /// The end of its output.
        tail: String,
    },
}

/// Returns a command for a program of a build. Of the caller's environment it gets only the search
/// path and the directory for temporary files, so that the result does not depend on unforeseen
/// variables. It starts in `/`, where only root can create files, so that neither the caller's
/// directory nor one above it is searched for settings or code.
pub(crate) fn tool(program: impl AsRef<OsStr>) -> Command {
    #[allow(clippy::disallowed_methods)]
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", search_path())
        .env("LC_ALL", "C")
        .current_dir("/");
    let temporary = std::env::var_os("TMPDIR").filter(|dir| Path::new(dir).is_absolute());
    if let Some(dir) = temporary {
        command.env("TMPDIR", dir);
    }
    tied::end_with_us(&mut command);
    command
}

/// Like `tool`, for a program that fetches: it also gets the variables for proxies and
/// certificates.
pub(crate) fn fetcher(program: impl AsRef<OsStr>) -> Command {
    let mut command = tool(program);
    keep(&mut command, &NETWORK);
    command
}

/// Passes these variables of the caller to the program, where they are set.
pub(crate) fn keep(command: &mut Command, names: &[&str]) {
    let set = names
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    command.envs(set);
}

/// Returns the absolute directories of `PATH`. An empty or relative one has another meaning in each
/// directory.
pub(crate) fn search_path() -> OsString {
    absolute_part(&std::env::var_os("PATH").unwrap_or_default())
}

fn absolute_part(path: &OsStr) -> OsString {
    let dirs: Vec<PathBuf> = std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .collect();
    // Joining the parts of a split path cannot fail.
    match std::env::join_paths(dirs) {
        Ok(path) if !path.is_empty() => path,
        _ => USUAL_PATH.into(),
    }
}

/// Runs a program and passes its output to `consume`, which need not read all of it. The program
/// runs to its end, but is killed if `consume` fails before that.
pub(crate) fn read<T, E>(
    command: &mut Command,
    consume: impl FnOnce(&mut ChildStdout) -> Result<T, E>,
) -> Result<Result<T, E>, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = |source| CommandError::Start {
        program: program.clone(),
        source,
    };
    let (errors, writer) = std::io::pipe().map_err(start)?;
    tracing::debug!(?command, "run");
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(writer);
    std::thread::scope(|scope| {
        // Standard error is read at the same time: the program would block once the pipe is full.
        let said = std::thread::Builder::new();
        let said = said.spawn_scoped(scope, || hear(errors, |_| {}));
        let said = said.map_err(start)?;
        let child = command.spawn();
        // Our copy of the write end must be closed, or the reader never sees the end.
        command.stderr(Stdio::null());
        let mut child = child.map_err(start)?;
        let mut consumed = None;
        let mut killed = false;
        if let Some(mut output) = child.stdout.take() {
            let result = consume(&mut output);
            if result.is_ok() {
                // Reads the rest: without a reader, the program would fail.
                let _ = std::io::copy(&mut output, &mut std::io::sink());
            } else if !matches!(output.read(&mut [0]), Ok(0)) {
                // The program had more output, so its own end was not the reason for the failure.
                killed = child.kill().is_ok();
            }
            consumed = Some(result);
        }
        let status = child.wait().map_err(start)?;
        let tail = said.join().unwrap_or_default();
        match consumed {
            Some(consumed) if killed || status.success() => Ok(consumed),
            // The program's own error explains why its output could not be used.
            _ => Err(CommandError::Failed {
                program: describe(command),
                status,
                tail,
            }),
        }
    })
}

/// Runs a program to its end, and passes each line of output (of both streams) to `line`.
pub(crate) fn run(command: &mut Command, line: impl FnMut(&str)) -> Result<(), CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = |source| CommandError::Start {
        program: program.clone(),
        source,
    };
    // One pipe for both streams keeps their order and needs only one reader.
    let (reader, writer) = std::io::pipe().map_err(start)?;
    let other = writer.try_clone().map_err(start)?;
    tracing::debug!(?command, "run");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(other)
        .spawn()
        .map_err(start)?;
    // Our copies of the write end must be closed, or the reader never sees the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let tail = hear(reader, line);
    let status = child.wait().map_err(start)?;
    if status.success() {
        return Ok(());
    }
    Err(CommandError::Failed {
        program: describe(command),
        status,
        tail,
    })
}

/// Reads to the end, passes each line to `line`, and returns the last lines.
fn hear(reader: impl Read, mut line: impl FnMut(&str)) -> String {
    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match (&mut reader).take(LINE_BYTES).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim_end();
        line(text);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text.to_owned());
    }
    Vec::from(tail).join("\n")
}

/// Runs a program to its end, and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    tracing::debug!(?command, "run");
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| CommandError::Start { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(CommandError::Failed {
        program: describe(command),
        status: output.status,
        tail: String::from_utf8_lossy(&output.stderr)
            .trim_end()
            .to_owned(),
    })
}

fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args().take(3))
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const CHILD: &str = "HEARTH_TEST_CHILD";

    /// Returns whether [`again`] started this process.
    pub(crate) fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    /// Returns a command that runs one of this program's tests in a process of its own, because all
    /// threads of a process share its environment.
    pub(crate) fn again(test: &str) -> Command {
        let mut again = tool(std::env::current_exe().unwrap());
        again.args(["--exact", test, "--nocapture"]);
        again.env(CHILD, "yes");
        again
    }

    #[test]
    fn programs_are_looked_for_in_absolute_directories_alone() {
        for (path, wanted) in [
            ("/a:.:/b::bin:../c:/d", "/a:/b:/d"),
            (".", USUAL_PATH),
            ("", USUAL_PATH),
        ] {
            assert_eq!(absolute_part(OsStr::new(path)), wanted, "{path:?}");
        }
    }

    #[test]
    fn a_program_knows_nothing_of_its_caller_but_what_is_named() {
        if is_child() {
            let said = output(tool("sh").args(["-c", "env; pwd"])).unwrap();
            print!("<<{said}>>");
            let said = output(fetcher("env").arg("--")).unwrap();
            print!("<<{said}>>");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let trap = dir.path().join("sh");
        std::fs::write(&trap, "#!/bin/sh\necho TRAPPED\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&trap, mode).unwrap();
        let mut test =
            again("command::tests::a_program_knows_nothing_of_its_caller_but_what_is_named");
        test.current_dir(dir.path())
            .env("PATH", ".::/usr/bin:/bin")
            .env("TAR_OPTIONS", "--exclude=*")
            .env("TMPDIR", "relative")
            .env("LC_ALL", "tlh")
            .env("https_proxy", "http://proxy.example");
        let said = output(&mut test).unwrap();
        let (_, said) = said.split_once("<<").unwrap();
        let (plain, rest) = said.split_once(">><<").unwrap();
        let mut plain: Vec<&str> = plain.lines().collect();
        plain.sort_unstable();
        // The shell sets PWD itself.
        assert_eq!(plain, ["/", "LC_ALL=C", "PATH=/usr/bin:/bin", "PWD=/"]);
        let (fetching, _) = rest.split_once(">>").unwrap();
        let mut fetching: Vec<&str> = fetching.lines().collect();
        fetching.sort_unstable();
        let proxy = "https_proxy=http://proxy.example";
        assert_eq!(fetching, ["LC_ALL=C", "PATH=/usr/bin:/bin", proxy]);
    }

    #[test]
    fn a_program_ends_with_the_build_that_is_killed() {
        if is_child() {
            let sleep = "echo; echo pid $$; exec sleep 1000";
            let _ = run(tool("sh").args(["-c", sleep]), |line| println!("{line}"));
            return;
        }
        let mut build = again("command::tests::a_program_ends_with_the_build_that_is_killed")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(build.stdout.take().unwrap()).lines();
        let pid = said.find_map(|line| Some(line.unwrap().strip_prefix("pid ")?.to_owned()));
        let status = format!("/proc/{}/stat", pid.unwrap());
        let lives = || {
            let status = std::fs::read_to_string(&status).unwrap_or_default();
            // Its new parent may not have reaped it yet.
            !status.is_empty() && !status.contains(") Z ")
        };
        assert!(lives());
        build.kill().unwrap();
        build.wait().unwrap();
        let begun = std::time::Instant::now();
        while lives() {
            assert!(begun.elapsed().as_secs() < 60, "it works on");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    #[test]
    fn lines_of_both_streams_are_heard() {
        let mut heard = Vec::new();
        run(
            tool("sh").args(["-c", "echo one; echo two >&2; printf three"]),
            |line| heard.push(line.to_owned()),
        )
        .unwrap();
        assert_eq!(heard, ["one", "two", "three"]);
    }

    #[test]
    fn a_failure_carries_the_end_of_the_output() {
        let error = run(
            tool("sh").args(["-c", "seq 100; echo broken >&2; exit 3"]),
            |_| {},
        )
        .unwrap_err();
        let CommandError::Failed { status, tail, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!(status.code(), Some(3));
        assert_eq!(tail.lines().count(), TAIL_LINES);
        assert!(tail.ends_with("100\nbroken"), "{tail}");
    }

    #[test]
    fn output_is_read_as_it_comes_and_a_failure_counts_more_than_it() {
        let sh = |script: &str, bytes: usize| {
            let mut said = vec![0; bytes];
            let consume = |output: &mut ChildStdout| output.read_exact(&mut said);
            read(tool("sh").args(["-c", script]), consume).map(|read| (read.is_ok(), said))
        };
        assert_eq!(sh("echo word", 4).unwrap(), (true, b"word".to_vec()));
        // More output than is read, and less than is wanted.
        assert!(sh("seq 100000", 1).unwrap().0);
        assert!(!sh("echo word", 6).unwrap().0);
        let error = sh("echo word; echo why >&2; exit 3", 6).unwrap_err();
        let CommandError::Failed { status, tail, .. } = &error else {
            panic!("{error:?}");
        };
        assert_eq!((status.code(), tail.as_str()), (Some(3), "why"));
    }

    #[test]
    fn a_program_whose_output_is_of_no_use_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let end = dir.path().join("end");
        // Output that exceeds a pipe's capacity, by shell built-ins.
        let script = format!(
            "n=0; while test $n -lt 100000; do echo word; n=$((n+1)); done; : > {}",
            end.display()
        );
        let consume = |output: &mut ChildStdout| {
            output.read_exact(&mut [0; 4]).unwrap();
            Err::<(), _>("no use")
        };
        let read = read(tool("sh").args(["-c", &script]), consume).unwrap();
        assert_eq!(read, Err("no use"));
        assert!(!end.exists(), "it worked on for nobody");
    }

    #[test]
    fn a_program_that_says_much_before_its_output_is_heard() {
        let script = "head --bytes=1048576 /dev/zero | tr '\\0' '\\n' >&2; echo word; \
                      echo why >&2; exit $1";
        let sh = |code: &str| {
            let mut said = String::new();
            let consume = |output: &mut ChildStdout| output.read_to_string(&mut said);
            let read = read(tool("sh").args(["-c", script, "sh", code]), consume);
            read.map(|read| {
                read.unwrap();
                said
            })
        };
        assert_eq!(sh("0").unwrap(), "word\n");
        let CommandError::Failed { tail, .. } = sh("3").unwrap_err() else {
            panic!("another error");
        };
        assert!(
            tail.ends_with("\nwhy") && tail.lines().count() == TAIL_LINES,
            "{tail}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = run(&mut tool("no-such-program"), |_| {}).unwrap_err();
        assert!(error.to_string().contains("no-such-program"));
    }
}
