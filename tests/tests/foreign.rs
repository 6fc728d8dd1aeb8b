#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! A foreign program, copied into the guest as a file: C with glibc, which uses features that the
//! agent's own programs do not (floating point, the C library's choice of vector code, threads,
//! fork). It must behave in a guest as it does on the host.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hearth_agent::client::Command;
use hearth_agent::proto::{ExitStatus, Input, OutputEnd, Put};
use hearth_tests::{Guest, dial_agent, kvm, not_measured, within};
use hearth_vmm::Vm;

const SOURCE: &str = r#"
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char text[70000];
static double roots[2];

static void *sum(void *half) {
    long from = half ? 500 : 0;
    for (long i = from; i < from + 500; i++) roots[half != 0] += sqrt((double)i);
    return NULL;
}

static int lower(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

/* Counts in /run/count for ever, nobody's child. */
static int count(void) {
    if (fork()) return 0;
    setsid();
    for (int fd = 0; fd < 3; fd++) close(fd);
    int file = open("/run/count", O_CREAT | O_WRONLY, 0644);
    for (unsigned long n = 1;; n++) {
        char line[32];
        pwrite(file, line, snprintf(line, sizeof line, "%020lu", n), 0);
        usleep(5000);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "abort")) abort();
    if (argc > 1 && !strcmp(argv[1], "count")) return count();
    size_t len = fread(text, 1, sizeof text - 1, stdin);
    printf("%zu bytes, %zu before the first z\n", len, strcspn(text, "z"));
    pthread_t other;
    if (pthread_create(&other, NULL, sum, argv)) return 1;
    sum(NULL);
    pthread_join(other, NULL);
    printf("%.9f %.17g\n", roots[0] + roots[1], exp(1.0) * sin(0.5));
    int numbers[1000];
    for (int i = 0; i < 1000; i++) numbers[i] = (i * 7919) % 1009;
    qsort(numbers, 1000, sizeof *numbers, lower);
    printf("%d %d %d\n", numbers[0], numbers[500], numbers[999]);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) _exit(41);
    int status;
    waitpid(child, &status, 0);
    fprintf(stderr, "%s %s\n", getenv("WHOSE"), argv[1]);
    return WEXITSTATUS(status) + 1;
}
"#;

/// Compiles the program, linked statically because the guest has no libraries. The error is the
/// compiler's output.
fn compile(dir: &Path) -> Result<PathBuf, String> {
    let (source, program) = (dir.join("foreign.c"), dir.join("foreign"));
    std::fs::write(&source, SOURCE).unwrap();
    let cc = std::process::Command::new("cc")
        .args(["-O2", "-static", "-pthread", "-o"])
        .args([&program, &source])
        .arg("-lm")
        .output()
        .map_err(|error| format!("cc: {error}"))?;
    match cc.status.success() {
        true => Ok(program),
        false => Err(String::from_utf8_lossy(&cc.stderr).into_owned()),
    }
}

/// Path of the program in the guest.
const THERE: &str = "/tmp/foreign";

/// Returns a guest with the program in it, and the program's path on the host. Reports the test as
/// skipped if the program cannot be compiled.
async fn guest_with_program(dir: &Path) -> Option<(Guest, PathBuf)> {
    let program = match compile(dir) {
        Ok(program) => program,
        Err(said) => {
            not_measured(&format!("no static C program: {said}"));
            return None;
        }
    };
    let mut guest = Guest::fork().await;
    let bytes = std::fs::read(&program).unwrap();
    let put = guest.agent.put(Put::new(THERE).mode(0o755), &bytes);
    within(20, "copy into the guest", put).await.unwrap();
    // Reads it back unchanged.
    let back = guest.agent.get(THERE, bytes.len());
    let back = within(20, "copy out of the guest", back).await.unwrap();
    assert!(back == bytes);
    Some((guest, program))
}

/// Returns how far the program has counted.
async fn count(vm: &Vm) -> u64 {
    let count = dial_agent(vm).await.get("/run/count", 100).await.unwrap();
    String::from_utf8_lossy(&count).parse().unwrap_or(0)
}

async fn counts_on(vm: &Vm, from: u64) -> u64 {
    let on = async {
        loop {
            let now = count(vm).await;
            if now > from {
                return now;
            }
        }
    };
    within(20, "a program that counts on", on).await
}

async fn stands_still(vm: &Vm) -> u64 {
    let at = count(vm).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(count(vm).await, at);
    at
}

#[tokio::test]
async fn a_c_program_does_what_it_does_here_and_none_of_it_in_a_clone_that_is_no_stranger_yet() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some((guest, program)) = guest_with_program(dir.path()).await else {
        return;
    };
    as_it_does_here(&guest, &program).await;
    stands_still_until_its_clone_is_a_stranger(guest).await;
}

async fn as_it_does_here(guest: &Guest, program: &Path) {
    let input = [b'a'; 65_000];
    let mut here = std::process::Command::new(program)
        .arg("word")
        .env("WHOSE", "mine")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    here.stdin.take().unwrap().write_all(&input).unwrap();
    let here = here.wait_with_output().unwrap();
    let command = Command::new(THERE)
        .args(["word"])
        .env("WHOSE", "mine")
        .stdin(Input::Pipe);
    let there = guest.run_with(command, &input).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(text(&there.stdout), text(&here.stdout));
    assert_eq!(text(&there.stderr), "mine word\n");
    assert_eq!(there.status, ExitStatus::Code(42));
    assert_eq!(here.status.code(), Some(42));
    assert_eq!(there.end, OutputEnd::Complete);

    let aborted = guest.run(Command::new(THERE).args(["abort"])).await;
    assert_eq!(aborted.status, ExitStatus::Signal(6));
}

async fn stands_still_until_its_clone_is_a_stranger(guest: Guest) {
    let started = guest.run(Command::new(THERE).args(["count"])).await;
    assert_eq!(started.status, ExitStatus::Code(0));
    // The program creates the file when it starts to count.
    let begun = async {
        while guest
            .connect()
            .await
            .stat("/run/count", true)
            .await
            .is_err()
        {}
    };
    within(20, "begin of the count", begun).await;
    counts_on(&guest.vm, 0).await;
    let mut agent = guest.connect().await;
    within(10, "standstill", agent.freeze()).await.unwrap();
    let at = stands_still(&guest.vm).await;
    within(10, "thaw", agent.thaw()).await.unwrap();
    counts_on(&guest.vm, at).await;

    within(10, "standstill", agent.freeze()).await.unwrap();
    drop(agent);
    let template = guest.freeze();
    for _ in 0..2 {
        let clone = template.fork().unwrap();
        let at = stands_still(&clone).await;
        let clone = Guest::refreshed(clone).await;
        counts_on(&clone.vm, at).await;
    }
}
