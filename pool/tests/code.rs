//! Code that `hearth run` runs: its language, its streams, and the message for a language that is
//! missing. Each case that needs a guest boots one, so they are few.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use hearth_images::{Images, Recipe};
use hearth_tests::{kvm, not_measured, shell_root};

/// Runs the command with this stdin; returns exit code, stdout and stderr.
fn hearth(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_hearth"))
        .arg("run")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The command may exit without reading it.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Whether the image is cached: building it needs the network.
fn cached(name: &str) -> bool {
    let recipe = Recipe::built_in(name).unwrap();
    let there = Images::open(None).unwrap().cached_root(&recipe).is_some();
    if !there {
        not_measured(&format!(
            "image {name} is not cached: hearth image build {name}"
        ));
    }
    there
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_cannot_be_run_is_said_before_a_guest_is_made() {
    for (args, wanted) in [
        (&["script.rb"][..], "hearth run -- script.rb"),
        (
            &["/no/such/script.py"],
            "/no/such/script.py: the code cannot be read",
        ),
        (&[], "--lang python"),
        (&["--lang", "cobol", "DISPLAY"], "python, javascript, shell"),
        (
            &["--image", "nosuch", "--", "true"],
            "no recipe is named nosuch",
        ),
        (&["--package", "numpy", "--", "true"], "--image python"),
        (
            &["--image", "python", "--root", "x", "--", "true"],
            "cannot be used with",
        ),
    ] {
        let (code, stdout, stderr) = hearth(args, "");
        // Where guests cannot run, that is reported first.
        if !stderr.contains(wanted) && !kvm() {
            return;
        }
        assert_eq!(
            (code, stdout.as_str()),
            (Some(125), ""),
            "{args:?}: {stderr}"
        );
        assert!(stderr.contains(wanted), "{args:?}: {stderr}");
    }
}

#[test]
fn code_of_a_shell_comes_as_stdin_or_file() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(image) = shell_root(dir.path(), &[], &[]) else {
        return;
    };
    let root = ["--root", text(&image)];
    let code = "echo $((6 * 7)); read -r line && echo \"<$line>\"; exit 3";
    // The code came from stdin, so nothing is left for it to read.
    let args = [&root[..], &["--lang", "sh"]].concat();
    let (status, stdout, stderr) = hearth(&args, code);
    assert_eq!((status, stdout.as_str()), (Some(3), "42\n"), "{stderr}");
    let file = dir.path().join("script.sh");
    let code = "echo \"$0 $1\"; read -r line; echo \"$line\"";
    std::fs::write(&file, code).unwrap();
    let args = [&root[..], &[text(&file), "--", "one two"]].concat();
    let (status, stdout, stderr) = hearth(&args, "typed\n");
    let expected = "/tmp/script.sh one two\ntyped\n";
    assert_eq!((status, stdout.as_str()), (Some(0), expected), "{stderr}");
    // A language that is missing in the root file system.
    let args = [&root[..], &["--lang", "python", "print(1)"]].concat();
    let (status, stdout, stderr) = hearth(&args, "");
    assert_eq!((status, stdout.as_str()), (Some(127), ""), "{stderr}");
    assert!(stderr.contains("--image python"), "{stderr}");
}

#[test]
fn python_runs_as_the_images_user_with_files_that_come_and_go() {
    if !kvm() || !cached("python") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("in")).unwrap();
    std::fs::write(at("in/secret"), "7").unwrap();
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(at("in/secret"), private).unwrap();
    let code = "import os, sys\nn = int(open('in/secret').read())\nos.mkdir('out')\n\
        print(6 * n, file=open('out/answer', 'w'))\nprint(os.getuid(), os.getcwd(), sys.argv[1:], sys.stdin.read())\n";
    let copies = [
        "--copy-in",
        &format!("{}:/home/user/in", text(&at("in"))),
        "--copy-out",
        &format!("/home/user/out:{}", text(&at("out"))),
    ];
    let args = [&copies[..], &["--lang", "python", code, "--", "a", "b"]].concat();
    let (status, stdout, stderr) = hearth(&args, "typed");
    assert_eq!(status, Some(0), "{stderr}");
    assert_eq!(stdout, "1000 /home/user ['a', 'b'] typed\n");
    assert_eq!(std::fs::read_to_string(at("out/answer")).unwrap(), "42\n");
}

#[test]
#[ignore = "long: Node.js starts slowly where ring 0 is emulated"]
fn javascript_runs_and_python_says_what_is_wrong_with_code() {
    if !kvm() || !cached("python") || !cached("javascript") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("script.js");
    std::fs::write(&file, "console.log(6 * 7); process.exit(5)").unwrap();
    let (status, stdout, stderr) = hearth(&[text(&file)], "");
    assert_eq!((status, stdout.as_str()), (Some(5), "42\n"), "{stderr}");
    let (status, stdout, stderr) = hearth(&["--lang", "py", "--user", "root", "def"], "");
    assert_eq!((status, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(
        stderr.contains("/tmp/main.py") && stderr.contains("SyntaxError"),
        "{stderr}"
    );
}
