//! Packages, programs and commands that try to reach beyond their tree. Files outside of it, the
//! witness, must not change.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use super::tests::{built, mode, not_measured, prepared_of, with_libraries};
use super::*;
use crate::{Silent, command};

#[path = "../../tests/support/without_namespaces.rs"]
mod without_namespaces;
use without_namespaces::without_namespaces;

const RECIPE: &str = r#"
name = "hostile"
suite = "bookworm"
packages = ["python3.11-minimal"]
applets = true
remove = ["/removed/file"]

[[file]]
path = "/written/file"
content = "of the recipe\n"

[[user]]
name = "user"
uid = 1000
"#;

/// A directory with a file, whose path scripts can use.
struct Witness(PathBuf);

impl Witness {
    fn new(dir: &Path) -> Self {
        let outside = dir.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "witness").unwrap();
        fs::set_permissions(outside.join("file"), fs::Permissions::from_mode(0o640)).unwrap();
        Self(outside)
    }

    fn check(&self) {
        assert_eq!(fs::read(self.0.join("file")).unwrap(), b"witness");
        assert_eq!(mode(&self.0.join("file")), 0o100_640);
        assert_eq!(fs::read_dir(&self.0).unwrap().count(), 1);
    }
}

/// Builds a package whose directories are links out of its tree, and another that has files in
/// them. Each program that a build might run is a script that leaves a mark in `outside`.
fn hostile_packages(dir: &Path, outside: &Path) -> Option<[PathBuf; 2]> {
    let at = |package: &str, path: &str| {
        let path = dir.join(package).join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    for link in ["written", "removed", "packaged", "home", "var"] {
        symlink(outside, at("first", link)).unwrap();
    }
    symlink(
        "../../../../../../../../../../proc/self/root",
        at("first", "etc"),
    )
    .unwrap();
    symlink(outside.join("file"), at("first", "opt")).unwrap();
    let script = format!(
        "#!/bin/sh\necho $0 > {0}/ran; echo $0 > {0}/file; echo $0 >> /ran\n",
        outside.display()
    );
    for program in [
        "sbin/ldconfig",
        "usr/sbin/ldconfig",
        "usr/bin/python3.11",
        "usr/lib64/ld-linux-x86-64.so.2",
    ] {
        fs::write(at("second", program), &script).unwrap();
        fs::set_permissions(at("second", program), fs::Permissions::from_mode(0o6755)).unwrap();
    }
    // The table of applets follows the script.
    let busybox = [script.as_bytes(), b"exit\n\0[\0[[\0ash\0\0"].concat();
    fs::write(at("second", "usr/bin/busybox"), busybox).unwrap();
    fs::set_permissions(
        at("second", "usr/bin/busybox"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    fs::write(at("second", "packaged/file"), "of the package\n").unwrap();
    fs::write(at("second", "packaged/new"), "of the package\n").unwrap();
    Some([built(dir, "first")?, built(dir, "second")?])
}

#[test]
fn a_hostile_package_changes_nothing_on_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Witness::new(dir.path());
    let Some(packages) = hostile_packages(dir.path(), &witness.0) else {
        return not_measured("no dpkg-deb");
    };
    let Some((recipe, cache)) = prepared_of(dir.path(), RECIPE, &packages) else {
        return not_measured("no mkfs.erofs");
    };
    // Whether such an image can be built does not matter.
    let _ = get(&cache, &recipe, &Silent);
    witness.check();
    let _ = without_namespaces(|| get(&cache, &recipe, &Silent));
    witness.check();
}

/// Builds the tree of a recipe with this machine's shell and its libraries.
fn shell_tree(dir: &Path) -> Option<TreeRoot> {
    let recipe = super::tests::RECIPE;
    let (recipe, cache) = super::tests::prepared(dir, recipe)?;
    let packages = &recipe.lock.as_ref()?.packages;
    let sources = cache.dir("source").ok()?;
    let files = super::tests::fetched(&sources, packages).ok()?;
    let tree = TreeRoot::create(&dir.join("tree")).ok()?;
    tree::fill(&tree, &files, &recipe.text, &Silent).ok()?;
    Some(tree)
}

/// Scripts of shell built-ins that try to reach a directory. Each writes a line to `$got` if it
/// succeeds.
fn ways(outside: &Path) -> [String; 8] {
    let (out, here) = (outside.display(), std::process::id());
    [
        format!("echo mine > {out}/file && echo write >> $got"),
        format!("echo mine > {out}/new && echo make >> $got"),
        format!("command read -r line < {out}/file && echo read >> $got"),
        format!("cd {out} && command read -r line < file && echo enter >> $got"),
        format!("echo mine > /proc/self/root{out}/file && echo root >> $got"),
        format!("echo mine > ../../../../../../../../..{out}/file && echo above >> $got"),
        format!("echo mine > /proc/{here}/root{out}/file && echo caller >> $got"),
        format!("kill -0 {here} && echo signal >> $got"),
    ]
}

#[test]
fn a_command_reaches_nothing_but_its_tree() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Witness::new(dir.path());
    let Some(tree) = shell_tree(dir.path()) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    if let Some(refused) = commands_refused() {
        return not_measured(&refused.to_string());
    }
    // A file of the same name in the tree.
    let own = witness.0.join("file");
    tree.write(&own, &b"tree's\n"[..], 0o644).unwrap();
    let more = [
        "for fd in 3 4 5 6 7 8 9; do echo mine >&$fd && echo fd $fd >> $got; done".to_owned(),
        "echo core > /proc/sys/kernel/core_pattern && echo setting >> $got".to_owned(),
    ];
    for way in ways(&witness.0).into_iter().chain(more) {
        let script = format!("got=/got; ({way}) 2> /dev/null; :");
        commands::run(&tree, &[script]).unwrap();
    }
    witness.check();
    let got = fs::read_to_string(tree.path().join("got")).unwrap();
    assert_eq!(got, "write\nmake\nread\nenter\nroot\nabove\n");
    assert_eq!(tree.read(&own, 100).unwrap(), b"mine\n");
    // The command runs as root, but has capabilities for files only, and cannot get more.
    let status = "while read -r name value; do case $name in CapBnd:|CapEff:|NoNewPrivs:|NSpid:) \
                  echo $name $value;; esac; done < /proc/self/status > /status";
    let proc =
        "test ! -d /proc/self || { for entry in /proc/[a-s]*; do echo $entry; done > /proc-has; }";
    commands::run(&tree, &[status.to_owned(), proc.to_owned()]).unwrap();
    match fs::read_to_string(tree.path().join("proc-has")) {
        Ok(entries) => assert_eq!(entries, "/proc/self\n"),
        Err(_) => return not_measured("no /proc for commands"),
    }
    let status = fs::read_to_string(tree.path().join("status")).unwrap();
    // CAP_CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID (capabilities(7)): bits 0, 1, 3, 4,
    // 6, 7.
    let rights = "00000000000000db";
    let wanted = format!("NSpid: 1\nCapEff: {rights}\nCapBnd: {rights}\nNoNewPrivs: 1\n");
    assert_eq!(status, wanted);
}

/// Returns a command for a program of the tree that is confined by rules.
fn by_rules(tree: &TreeRoot, program: &str, args: &[&str]) -> Result<Command, String> {
    let linker = "lib64/ld-linux-x86-64.so.2";
    let mut command = rules::command(tree, linker).map_err(|error| error.to_string())?;
    command
        .arg("--library-path")
        .arg(tree.path().join("usr/lib/x86_64-linux-gnu"))
        .arg(tree.path().join(program))
        .args(args);
    Ok(command)
}

#[test]
fn a_program_confined_by_rules_reaches_nothing_but_its_tree() {
    let dir = tempfile::tempdir().unwrap();
    let witness = Witness::new(dir.path());
    let Some(tree) = shell_tree(dir.path()) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    let got = tree.path().join("got");
    let run = |script: &str| {
        let mut shell = by_rules(&tree, "bin/sh", &["-c", script])?;
        Ok::<_, String>(command::run(&mut shell, |_| {}))
    };
    let try_all = |outside: &Path| {
        for way in ways(outside) {
            run(&format!("got={}; {way}", got.display()))?.ok();
        }
        Ok::<_, String>(())
    };
    if let Err(why) = try_all(&witness.0) {
        return not_measured(&why);
    }
    witness.check();
    assert!(!got.exists(), "{}", fs::read_to_string(&got).unwrap());
    // The shell can start no program of this machine, and no process.
    for script in ["exec /bin/true", "exec /usr/bin/env", "(:)"] {
        run(script).unwrap().unwrap_err();
    }
    // Inside the tree the same scripts succeed, except for changing the directory.
    let inside = tree.path().join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(inside.join("file"), "tree's\n").unwrap();
    try_all(&inside).unwrap();
    let got = fs::read_to_string(&got).unwrap();
    assert_eq!(got, "write\nmake\nread\nroot\nabove\n");
}

/// Ways to make the kernel send SIGKILL to a process, directly or when the program's output is
/// read. They are in Perl, which needs no module for system calls. Numbers are those of fcntl.h,
/// asm-generic/ioctls.h and unistd_64.h.
fn signals(other: u32) -> [(&'static str, String); 9] {
    [
        ("F_SETSIG", "fcntl(STDOUT, 10, 9)".to_owned()),
        ("F_SETOWN", format!("fcntl(STDOUT, 8, {other})")),
        (
            "F_SETOWN_EX",
            format!("fcntl(STDOUT, 15, my $owner = pack('ii', 1, {other}))"),
        ),
        // The kernel ignores the upper half.
        (
            "F_SETOWN by another number",
            format!("syscall(72, 1, 0x100000008, {other}) == 0"),
        ),
        // O_WRONLY and O_ASYNC.
        ("F_SETFL", "fcntl(STDOUT, 4, 020001)".to_owned()),
        (
            "FIOASYNC",
            "ioctl(STDOUT, 0x5452, my $on = pack('i', 1))".to_owned(),
        ),
        ("F_NOTIFY", "fcntl(STDOUT, 1026, 2)".to_owned()),
        ("kill", format!("kill(9, {other})")),
        ("tgkill", format!("syscall(234, {other}, {other}, 9) == 0")),
    ]
}

#[test]
fn a_program_confined_by_rules_has_no_signal_sent() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tree) = shell_tree(dir.path()) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    let Some(files) = with_libraries("/usr/bin/perl") else {
        return not_measured("no perl");
    };
    for file in files {
        let content = fs::File::open(&file).unwrap();
        tree.write(Path::new(&file), content, 0o755).unwrap();
    }
    let mut other = command::tool("sleep").arg("1000").spawn().unwrap();
    let ways = signals(other.id()).into_iter();
    // A harmless call, to see that the script runs.
    let ways = ways.chain([("F_GETFD", "fcntl(STDOUT, 1, 0)".to_owned())]);
    let script: String = ways
        .map(|(name, way)| format!("print \"{name}\\n\" if {way};"))
        .collect();
    // The script is a file: for a script given as an argument, Perl first opens /dev/null.
    let file = Path::new("script");
    let script = format!("$| = 1; {script}");
    tree.write(file, script.as_bytes(), 0o644).unwrap();
    let file = tree.path().join(file);
    let mut done = Vec::new();
    let run = by_rules(&tree, "usr/bin/perl", &[file.to_str().unwrap()])
        .map(|mut perl| command::run(&mut perl, |line| done.push(line.to_owned())));
    let lives = other.try_wait().unwrap().is_none();
    other.kill().unwrap();
    other.wait().unwrap();
    match run {
        Ok(run) => run.unwrap(),
        Err(why) => return not_measured(&why),
    }
    assert_eq!(done, ["F_GETFD"]);
    assert!(lives, "it was killed");
}

#[test]
fn a_program_confined_by_rules_has_no_rights_of_root_s() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tree) = shell_tree(dir.path()) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    // The process lives until its output, which does not fit into a pipe, is read.
    let script = "echo $$; n=0; while test $n -lt 100000; do echo word; n=$((n+1)); done";
    let mut shell = match by_rules(&tree, "bin/sh", &["-c", script]) {
        Ok(shell) => shell,
        Err(why) => return not_measured(&why),
    };
    let mut rights = Vec::new();
    let look = |line: &str| {
        if rights.is_empty() {
            let status = fs::read_to_string(format!("/proc/{line}/status")).unwrap();
            let has = |line: &&str| {
                ["CapInh", "CapPrm", "CapEff"].contains(&line.split(':').next().unwrap())
            };
            rights.extend(status.lines().filter(has).map(str::to_owned));
        }
    };
    command::run(&mut shell, look).unwrap();
    let none = ["CapInh", "CapPrm", "CapEff"].map(|set| format!("{set}:\t{:016}", 0));
    assert_eq!(rights, none);
}

#[test]
fn where_namespaces_are_refused_a_recipe_with_commands_is_before_anything_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let text = super::tests::RECIPE.replace("remove", "commands = ['true']\nremove");
    let Some((recipe, cache)) = super::tests::prepared(dir.path(), &text) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    fs::remove_dir_all(cache.root().join("source")).unwrap();
    let error = without_namespaces(|| {
        assert!(commands_refused().is_some());
        get(&cache, &recipe, &Silent).unwrap_err()
    });
    assert!(matches!(error, RootError::NoNamespaces(_)), "{error}");
    assert!(!cache.root().join("source").exists());
}

#[test]
fn a_command_that_is_killed_is_told_as_a_shell_tells_it() {
    let dir = tempfile::tempdir().unwrap();
    let Some(tree) = shell_tree(dir.path()) else {
        return not_measured("no dpkg-deb, ldd or mkfs.erofs");
    };
    if let Some(refused) = commands_refused() {
        return not_measured(&refused.to_string());
    }
    // The first process of a PID namespace cannot kill itself by a signal.
    let error = commands::run(&tree, &["ulimit -t 0; while :; do :; done".to_owned()]);
    let RootError::Command {
        source: command::CommandError::Failed { status, .. },
        ..
    } = error.unwrap_err()
    else {
        panic!("another error");
    };
    assert!(status.code().is_some_and(|code| code > 128) || status.signal().is_some());
}
