//! Sessions with interpreters of this machine, through a real agent, without a VM.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests"
)]

mod common;

use std::{
    future::{Future, poll_fn},
    path::Path,
    task::Poll,
    time::Duration,
};

use common::Agent;
use hearth_agent::{
    client::{Call, CallEnd, Language, Outcome, OutputLimits, OutputStream, Session, SessionError},
    proto::ExitStatus,
};
use tokio::net::UnixStream;

const SOON: Duration = Duration::from_millis(300);

/// Starts a session, if this machine has the interpreter.
async fn start(agent: &Agent, language: Language) -> Option<Session<UnixStream>> {
    let program = match language {
        Language::Python => "/usr/bin/python3",
        Language::Javascript => "/usr/bin/node",
        _ => "/bin/bash",
    };
    if !Path::new(program).exists() {
        println!("NOT MEASURED: no {program} on this machine");
        return None;
    }
    Some(
        Session::start(agent.client().await, language.command())
            .await
            .unwrap(),
    )
}

async fn run(session: &mut Session<UnixStream>, code: &str) -> Outcome {
    let outcome = session
        .run(Call::new(code).timeout(Duration::from_secs(60)))
        .await
        .unwrap();
    assert!(!outcome.timed_out, "{code}: {outcome:?}");
    outcome
}

async fn value(session: &mut Session<UnixStream>, code: &str) -> String {
    match run(session, code).await.end {
        CallEnd::Value(value) => value,
        other => panic!("{code}: {other:?}"),
    }
}

async fn error(session: &mut Session<UnixStream>, code: &str) -> String {
    match run(session, code).await.end {
        CallEnd::Error(error) => error,
        other => panic!("{code}: {other:?}"),
    }
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn python_keeps_its_state_and_tells_value_error_and_outputs_apart() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let session = &mut session;
    assert_eq!(run(session, "x = 6 * 7").await.end, CallEnd::Nothing);
    assert_eq!(value(session, "x").await, "42");
    assert_eq!(
        value(session, "def double(y):\n    return 2 * y\ndouble(_)").await,
        "84"
    );
    let outcome = run(
        session,
        "import sys\nprint('out'); print('err', file=sys.stderr); 'é\\0'",
    )
    .await;
    assert_eq!(text(&outcome.stdout), "out\n");
    assert_eq!(text(&outcome.stderr), "err\n");
    assert_eq!(outcome.end, CallEnd::Value("'é\\x00'".into()));
    let error = error(session, "def f():\n    1 / 0\nf()").await;
    assert!(error.starts_with("Traceback"), "{error}");
    assert!(error.contains("line 2, in f\n    1 / 0"), "{error}");
    assert!(
        error.ends_with("ZeroDivisionError: division by zero\n"),
        "{error}"
    );
    assert!(!error.contains("<hearth>"), "{error}");
    assert_eq!(
        value(session, "import asyncio\nawait asyncio.sleep(0, 5)").await,
        "5"
    );
    assert_eq!(
        value(session, "__name__, sys.argv").await,
        "('__main__', ['-c'])"
    );
}

#[tokio::test]
async fn python_survives_what_code_does_to_it_or_says_that_it_did_not() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let session = &mut session;
    run(session, "kept = 1").await;
    assert!(error(session, "a b").await.contains("SyntaxError"));
    assert!(
        error(session, "def f(): return f()\nf()")
            .await
            .contains("RecursionError")
    );
    assert!(
        error(session, "import sys; sys.exit(3)")
            .await
            .contains("SystemExit: 3")
    );
    assert!(
        error(session, "input()").await.contains("EOFError"),
        "no input is there"
    );
    run(session, "import os, sys\nos.close(1)\nos.close(2)").await;
    run(session, "sys.stdout.close()").await;
    let outcome = run(session, "print('still here')").await;
    assert_eq!(text(&outcome.stdout), "still here\n");
    let code = "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,), daemon=True)\nt.start()";
    run(session, code).await;
    assert_eq!(value(session, "t.is_alive(), kept").await, "(True, 1)");
    assert_eq!(
        value(
            session,
            "pid = os.fork()\nif pid: os.waitpid(pid, 0)\npid != 0"
        )
        .await,
        "True"
    );
    let outcome = run(session, "print(end='x' * (8 << 20))").await;
    assert_eq!((outcome.stdout.len(), outcome.stdout_cut), (8 << 20, 0));
    let limits = OutputLimits {
        stdout_bytes: 10,
        stderr_bytes: 10,
    };
    let outcome = session
        .run(Call::new("print('x' * 99)").limits(limits))
        .await
        .unwrap();
    assert_eq!((outcome.stdout.len(), outcome.stdout_cut), (10, 90));
    let outcome = run(session, "'y' * (1 << 20)").await;
    assert_eq!(outcome.end_cut, 2, "the quotes are too much");

    let outcome = run(
        session,
        "print('last words')\nsys.stdout.flush()\nos._exit(7)",
    )
    .await;
    assert_eq!(outcome.end, CallEnd::Exited(ExitStatus::Code(7)));
    assert_eq!(text(&outcome.stdout), "last words\n");
    let outcome = run(session, "'kept' in globals()").await;
    assert_eq!(outcome.end, CallEnd::Value("False".into()));
    assert!(outcome.restarted);
    assert!(!run(session, "1").await.restarted, "it is said once");
    let outcome = run(
        session,
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    )
    .await;
    assert_eq!(outcome.end, CallEnd::Exited(ExitStatus::Signal(11)));
    assert_eq!(value(session, "2").await, "2");
}

#[tokio::test]
async fn python_that_runs_too_long_is_interrupted_and_killed_if_it_does_not_mind() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let session = &mut session;
    run(session, "x = 1").await;
    for code in [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import asyncio\nawait asyncio.sleep(60)",
    ] {
        let outcome = session.run(Call::new(code).timeout(SOON)).await.unwrap();
        assert!(outcome.timed_out, "{code}");
        let CallEnd::Error(error) = outcome.end else {
            panic!("{code}: {:?}", outcome.end);
        };
        assert!(error.contains("KeyboardInterrupt"), "{code}: {error}");
        assert_eq!(value(session, "x").await, "1", "after {code}");
    }
    // Calls that are cancelled by their caller.
    for _ in 0..3 {
        let _ = tokio::time::timeout(SOON, session.run("print('noise')\nwhile True: pass")).await;
        let outcome = run(session, "x").await;
        assert_eq!(outcome.end, CallEnd::Value("1".into()));
        assert_eq!(
            text(&outcome.stdout),
            "",
            "what was given up is not heard of"
        );
    }
    let stubborn = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass";
    let call = Call::new(stubborn).timeout(SOON).grace(SOON);
    let outcome = session.run(call).await.unwrap();
    assert_eq!(outcome.end, CallEnd::Exited(ExitStatus::Signal(9)));
    assert!(outcome.timed_out);
    assert!(run(session, "1").await.restarted);
}

#[tokio::test]
async fn code_of_any_size_goes_in_and_none_that_was_given_up_half_way_runs() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let session = &mut session;
    let code = format!("#{}\n1 + 1", "x".repeat(1 << 20));
    assert_eq!(value(session, &code).await, "2");
    assert!(matches!(session.run("1\0").await, Err(SessionError::Nul)));
    let dir = tempfile::tempdir().unwrap();
    let ran = dir.path().join("ran");
    // Cancelled when no more than the window was sent, which is what the first poll sends.
    let code = format!("open({:?}, 'w')\n#{}", ran, "x".repeat(1 << 20));
    let mut call = Box::pin(session.run(code));
    let ended = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx).is_ready())).await;
    assert!(!ended);
    drop(call);
    assert_eq!(value(session, "3").await, "3");
    assert!(!ran.exists());
}

#[tokio::test]
async fn answers_of_the_codes_own_making_end_the_session_and_the_next_call_has_another() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let session = &mut session;
    let forged = "import os\nfor fd in range(3, 40):\n    try: os.write(fd, b'gotcha! ' * 10)\n    except OSError: pass";
    let error = session.run(forged).await.unwrap_err();
    assert!(matches!(error, SessionError::Garbled), "{error}");
    assert!(run(session, "1").await.restarted);
    let code = r#"
import subprocess, sys
count = "import os; print(len(os.listdir('/proc/self/fd')))"
subprocess.run([sys.executable, "-c", count], close_fds=False, capture_output=True, text=True).stdout"#;
    let open = value(session, code).await;
    assert_eq!(
        open, r"'4\n'",
        "0, 1, 2 and the directory: no descriptor of ours"
    );
}

#[tokio::test]
async fn a_reseeded_interpreter_draws_anew_and_runs_its_hooks() {
    let agent = Agent::start().await;
    for (language, seed, draw, hook) in [
        (
            Language::Python,
            "import random\nrandom.seed(1)",
            "random.random()",
            "import hearth\nhooked = 0\ndef again():\n    global hooked\n    hooked += 1\nhearth.on_clone(again)",
        ),
        (
            Language::Javascript,
            "",
            "Math.random()",
            "var hooked = 0; hearth.onClone(() => { hooked += 1 })",
        ),
    ] {
        let Some(mut session) = start(&agent, language).await else {
            continue;
        };
        let session = &mut session;
        run(session, hook).await;
        run(session, seed).await;
        let mut drawn = Vec::new();
        for byte in [1, 2, 1] {
            session.reseed(&[byte; 64]).await.unwrap();
            drawn.push(value(session, draw).await);
        }
        assert_eq!(drawn[0], drawn[2], "it is the seed that counts");
        assert_ne!(drawn[0], drawn[1]);
        assert_eq!(value(session, "hooked").await, "3");
    }
    let mut session = start(&agent, Language::Python).await.unwrap();
    run(
        &mut session,
        "import hearth\nhearth.on_clone(lambda: 1 / 0)",
    )
    .await;
    let error = session.reseed(&[0; 64]).await.unwrap_err();
    assert!(error.to_string().contains("ZeroDivisionError"), "{error}");
}

#[tokio::test]
async fn javascript_keeps_its_state_and_survives_what_code_does() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Javascript).await else {
        return;
    };
    let session = &mut session;
    run(session, "let x = 6 * 7; const twice = (y) => 2 * y").await;
    assert_eq!(value(session, "twice(x)").await, "84");
    let outcome = run(
        session,
        "console.log('out'); console.error('err'); ({ a: [1] })",
    )
    .await;
    assert_eq!(
        (text(&outcome.stdout), text(&outcome.stderr)),
        ("out\n", "err\n")
    );
    assert_eq!(outcome.end, CallEnd::Value("{ a: [ 1 ] }".into()));
    assert_eq!(value(session, "await Promise.resolve(5)").await, "5");
    assert_eq!(
        value(session, "(await import('fs')).existsSync('/')").await,
        "true"
    );
    assert_eq!(value(session, "require('path').sep").await, "'/'");
    assert!(error(session, "a b").await.contains("SyntaxError"));
    assert!(
        error(session, "const f = () => f(); f()")
            .await
            .contains("RangeError")
    );
    let error = error(session, "const g = () => nope.x; g()").await;
    assert!(
        error.contains("ReferenceError") && !error.contains("[eval]"),
        "{error}"
    );
    let outcome = run(session, "setTimeout(() => { throw new Error('late') }, 1); await new Promise((r) => setTimeout(r, 50))").await;
    assert!(text(&outcome.stderr).contains("Error: late"));
    for code in ["for (;;);", "await new Promise(() => {})"] {
        let outcome = session.run(Call::new(code).timeout(SOON)).await.unwrap();
        assert!(outcome.timed_out, "{code}");
        assert!(
            matches!(outcome.end, CallEnd::Error(_)),
            "{code}: {:?}",
            outcome.end
        );
        assert_eq!(value(session, "x").await, "42", "after {code}");
    }
    let outcome = run(session, "process.stdout.write('x'.repeat(8 << 20))").await;
    assert_eq!(outcome.stdout.len(), 8 << 20);
    for (code, status) in [("process.exit(4)", 4), ("require('fs').closeSync(1)", 70)] {
        run(session, code).await;
        let outcome = run(session, "typeof x").await;
        if let CallEnd::Exited(ended) = outcome.end {
            // The interpreter exited just after its answer.
            assert_eq!(ended, ExitStatus::Code(status), "{code}");
            assert!(run(session, "1").await.restarted, "{code}");
        } else {
            assert_eq!(outcome.end, CallEnd::Value("'undefined'".into()), "{code}");
            assert!(outcome.restarted, "{code}");
        }
    }
    for draw in [
        "crypto.randomUUID()",
        "require('crypto').randomInt(1, 2 ** 40)",
    ] {
        assert_ne!(value(session, draw).await, value(session, draw).await);
    }
    assert!(error_of_range(session).await.contains("RangeError"));
}

async fn error_of_range(session: &mut Session<UnixStream>) -> String {
    error(session, "require('crypto').randomInt(5, 5)").await
}

#[tokio::test]
async fn a_shell_keeps_its_state_and_gives_exit_codes() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Shell).await else {
        return;
    };
    let session = &mut session;
    assert_eq!(
        value(session, "x=5; cd /tmp; declare -A m; m[a]=b").await,
        "0"
    );
    let outcome = run(session, "echo $x ${m[a]}; pwd; echo err >&2; false").await;
    assert_eq!(text(&outcome.stdout), "5 b\n/tmp\n");
    assert_eq!(text(&outcome.stderr), "err\n");
    assert_eq!(outcome.end, CallEnd::Value("1".into()));
    assert_ne!(value(session, "if then").await, "0");
    assert_eq!(value(session, "exec 1>&-").await, "0");
    assert_eq!(text(&run(session, "echo still").await.stdout), "still\n");
    let outcome = run(session, "ls /proc/self/fd | wc -l").await;
    assert_eq!(
        text(&outcome.stdout),
        "5\n",
        "0, 1, 2, the directory and the code: no descriptor of ours"
    );
    let outcome = session
        .run(Call::new("sleep 60; echo not reached").timeout(SOON))
        .await
        .unwrap();
    assert_eq!(
        (outcome.end, text(&outcome.stdout)),
        (CallEnd::Value("130".into()), "")
    );
    assert_eq!(text(&run(session, "echo $x").await.stdout), "5\n");
    // A program that the first interrupt does not reach, as with one that is just being started,
    // gets another.
    let deaf = r#"bash -c 'trap "((heard++)) && exit" INT; while :; do sleep 0.1; done'"#;
    let outcome = session.run(Call::new(deaf).timeout(SOON)).await.unwrap();
    assert_eq!(outcome.end, CallEnd::Value("130".into()));
    assert_eq!(text(&run(session, "echo $x").await.stdout), "5\n");
    let endless = Call::new("while :; do :; done").timeout(SOON).grace(SOON);
    assert_eq!(
        session.run(endless).await.unwrap().end,
        CallEnd::Exited(ExitStatus::Signal(9))
    );
    assert!(run(session, "true").await.restarted);
    let outcome = run(session, "exit 4").await;
    assert_eq!(outcome.end, CallEnd::Exited(ExitStatus::Code(4)));
}

#[tokio::test]
async fn output_is_heard_while_the_code_runs_and_never_behind_its_value() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Python).await else {
        return;
    };
    let mut heard = Vec::new();
    for number in 0..200 {
        let code =
            format!("import sys\nprint({number})\nprint({number}, file=sys.stderr)\n{number}");
        let outcome = session
            .run_with(code, |stream, bytes| heard.push((stream, bytes.to_vec())))
            .await
            .unwrap();
        assert_eq!(outcome.stdout, format!("{number}\n").as_bytes());
        assert_eq!(outcome.stderr, format!("{number}\n").as_bytes());
    }
    assert!(heard.contains(&(OutputStream::Stderr, b"199\n".to_vec())));
}

#[tokio::test]
async fn an_interpreter_that_is_not_there_or_does_not_come_up_is_an_error_with_what_it_said() {
    let agent = Agent::start().await;
    let command = Language::Python
        .command()
        .env_clear()
        .env("PATH", "/nowhere");
    let error = Session::start(agent.client().await, command)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("python3: no such program"),
        "{error}"
    );
    if start(&agent, Language::Python).await.is_none() {
        return;
    }
    let command = Language::Python.command().env("PYTHONHOME", "/nowhere");
    let error = Session::start(agent.client().await, command)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, SessionError::NotReady { said, .. } if !said.is_empty()),
        "{error}"
    );
}

#[tokio::test]
async fn dropping_a_session_ends_its_interpreter_and_what_code_started() {
    let agent = Agent::start().await;
    let Some(mut session) = start(&agent, Language::Shell).await else {
        return;
    };
    run(&mut session, "sleep 600 & echo $! $$").await;
    let outcome = run(&mut session, "echo $! $$").await;
    let pids: Vec<u32> = text(&outcome.stdout)
        .split_whitespace()
        .map(|pid| pid.parse().unwrap())
        .collect();
    drop(session);
    for pid in pids {
        common::eventually("killed", || !common::is_alive(pid)).await;
    }
}
