//! The `hearth` command in an untrusted directory, which is the use of a sandbox: nothing in the
//! directory is run or read unless it is named. The program is a copy far from the sources that it
//! was built from.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use hearth_images::{Images, Silent};
use hearth_tests::{kvm, not_measured};

/// Programs that an image build starts, directly or indirectly.
const PROGRAMS: [&str; 21] = [
    "apt-get",
    "apt-helper",
    "as",
    "cargo",
    "cc",
    "chroot",
    "cp",
    "dpkg-deb",
    "gcc",
    "ld",
    "make",
    "mkfs.erofs",
    "mount",
    "patch",
    "pip",
    "python3",
    "rustc",
    "sh",
    "tar",
    "unshare",
    "xz",
];
/// Modules that Python would import from its directory.
const MODULES: [&str; 5] = [
    "compileall.py",
    "pip.py",
    "sitecustomize.py",
    "usercustomize.py",
    "zipfile.py",
];

/// Opens this user's own cache; missing images are built.
fn usual() -> Images {
    Images::open(None).unwrap()
}

/// A temporary directory with the command, a directory full of traps, a directory for the marks
/// that these leave, and a cache.
struct Place {
    dir: tempfile::TempDir,
    /// Whether programs are looked up in the working directory, too.
    dot: bool,
}

impl Place {
    /// Creates the place. Its cache has a kernel, because building one takes minutes and needs no
    /// program that the other builds do not need.
    fn new(dot: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir, dot };
        for name in ["marks", "traps", "cache"] {
            fs::create_dir(place.at(name)).unwrap();
        }
        fs::copy(env!("CARGO_BIN_EXE_hearth"), place.at("hearth")).unwrap();
        place.keep(&usual().kernel(&Silent).unwrap());
        place.traps();
        place
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Copies the cache entry of `file` from the user's cache.
    fn keep(&self, file: &Path) {
        let entry = file.parent().unwrap();
        let usual = usual();
        let to = entry.strip_prefix(usual.cache_dir()).unwrap();
        let to = self.at("cache/hearth").join(to);
        fs::create_dir_all(&to).unwrap();
        fs::copy(file, to.join(file.file_name().unwrap())).unwrap();
    }

    fn trap(&self, name: &str, text: &str) {
        let path = self.at("traps").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn traps(&self) {
        let mark = |name: &str| self.at("marks").join(name.replace('/', "-"));
        for name in PROGRAMS {
            let mark = mark(name);
            self.trap(
                name,
                &format!("#!/bin/sh\n: > {}\nexit 1\n", mark.display()),
            );
        }
        for name in MODULES {
            self.trap(name, &format!("open({:?}, 'w')\n", mark(name)));
        }
        let code = |name: &str| {
            let mark = mark(name);
            format!("fn main() {{ std::fs::write({mark:?}, \"\").unwrap(); }}\n")
        };
        self.trap("agent/build.rs", &code("build.rs"));
        self.trap("agent/src/main.rs", &code("main.rs"));
        self.trap(
            "agent/Cargo.toml",
            "[package]\nname = 'hearth-agent'\nversion = '0.1.0'\nedition = '2024'\n\
             [[bin]]\nname = 'hearth-init'\npath = 'src/main.rs'\n",
        );
        self.trap(
            "Cargo.toml",
            "[workspace]\nmembers = ['agent']\nresolver = '3'\n[profile.guest]\ninherits = 'release'\n",
        );
        self.trap(
            "Cargo.lock",
            "version = 4\n[[package]]\nname = 'hearth-agent'\nversion = '0.1.0'\n",
        );
        let wrapper = self.at("traps/rustc");
        let settings = format!("[build]\nrustc = {wrapper:?}\nrustc-wrapper = {wrapper:?}\n");
        self.trap(".cargo/config.toml", &settings);
        self.trap(
            "rust-toolchain.toml",
            "[toolchain]\nchannel = 'none-such'\n",
        );
        self.trap(".python-version", "none-such\n");
        self.trap("hearth.toml", "this is no configuration\n");
        self.trap(
            ".env",
            "HEARTH_KERNEL=/no/such/kernel\nHEARTH_AGENT=/no/such/agent\n",
        );
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.at("hearth"));
        command
            .args(args)
            .current_dir(self.at("traps"))
            .env("XDG_CACHE_HOME", self.at("cache"))
            .env_remove("HEARTH_KERNEL")
            .env("PATH", self.path())
            .stdin(Stdio::null());
        // Under cargo, this variable names a program, too.
        command.env_remove("CARGO");
        command
    }

    fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap();
        match self.dot {
            true => format!(".:{path}:"),
            false => path,
        }
    }

    /// Runs the command to its end; it must succeed, and no trap may be triggered.
    fn works(&self, args: &[&str]) -> Output {
        let output = self.command(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        self.unharmed(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        output
    }

    fn unharmed(&self, args: &[&str]) {
        let marks = fs::read_dir(self.at("marks")).unwrap();
        let marks: Vec<_> = marks.map(|mark| mark.unwrap().file_name()).collect();
        assert!(marks.is_empty(), "hearth {args:?} ran {marks:?}");
    }
}

/// Checks that the traps work, so that the absence of marks means something.
#[test]
fn the_traps_are_traps() {
    let place = Place::new(true);
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new("/usr/bin/env");
        command.arg(program).args(args).env("PATH", place.path());
        let _ = command.current_dir(place.at("traps")).output().unwrap();
    };
    run("tar", &[]);
    run("/usr/bin/python3", &["-m", "pip"]);
    for mark in ["tar", "pip.py"] {
        assert!(place.at("marks").join(mark).exists(), "{mark}");
    }
}

fn nothing_is_run_in(place: &Place) {
    // The doctor's findings about this machine do not matter here.
    let doctor = place.command(&["doctor"]).output().unwrap();
    place.unharmed(&["doctor"]);
    assert!(!doctor.stdout.is_empty());
    place.works(&["image", "list"]);
    // Built for the agent that the command contains, whatever crates are in this directory.
    let built = place.works(&["image", "build", "base"]);
    let built = String::from_utf8(built.stdout).unwrap();
    let cache = place.at("cache");
    let made = built.lines().map(Path::new);
    assert_eq!(
        made.filter(|path| path.starts_with(&cache)).count(),
        2,
        "{built}"
    );
    fs::create_dir(place.at("traps/tree")).unwrap();
    fs::write(place.at("traps/tree/file"), "text").unwrap();
    let tar = Command::new("/usr/bin/tar")
        .args(["--create", "--file", "tree.tar", "tree"])
        .current_dir(place.at("traps"))
        .status();
    assert!(tar.unwrap().success());
    for source in ["tree", "tree.tar"] {
        // Paths that are given as arguments are relative to the directory.
        place.works(&["image", "import", source, &format!("{source}.erofs")]);
        assert!(place.at("traps").join(format!("{source}.erofs")).is_file());
    }
    if kvm() {
        let ran = place.works(&["run", "--", "echo", "fine"]);
        assert_eq!(ran.stdout, b"fine\n");
    }
}

#[test]
fn nothing_in_the_directory_is_run() {
    let base = usual().base(&Silent).unwrap();
    for dot in [false, true] {
        let place = Place::new(dot);
        place.keep(&base.initramfs);
        nothing_is_run_in(&place);
    }
}

#[test]
#[ignore = "long: compiles the agent twice"]
fn nothing_in_the_directory_is_run_while_the_agent_is_built() {
    for dot in [false, true] {
        nothing_is_run_in(&Place::new(dot));
    }
}

/// Both kinds of packages, and both Pythons: this machine's and the image's.
#[test]
#[ignore = "long: fetches packages and builds a root file system"]
fn nothing_in_the_directory_is_run_by_python_or_apt() {
    let place = Place::new(true);
    let args = ["image", "build", "python", "--package", "six"];
    let output = place.command(&args).output().unwrap();
    place.unharmed(&args);
    let said = String::from_utf8_lossy(&output.stderr);
    if ["cannot fetch", "python3-pip", "pip found no wheels"]
        .iter()
        .any(|lack| said.contains(lack))
    {
        return not_measured(&said.replace('\n', " "));
    }
    assert_eq!(output.status.code(), Some(0), "{said}");
}

#[test]
fn a_cache_that_others_may_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("hearth");
    fs::create_dir(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
    for args in [["image", "list"], ["image", "path"], ["doctor", ""]] {
        let args = args.iter().filter(|word| !word.is_empty());
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        let base = args.clone().any(|word| *word == "path").then_some("base");
        let output = command
            .args(args)
            .args(base)
            .env("XDG_CACHE_HOME", dir.path())
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_ne!(output.status.code(), Some(0), "{said}");
        assert!(said.contains("everybody may write"), "{said}");
    }
}

#[test]
fn what_only_looks_makes_no_cache() {
    let dir = tempfile::tempdir().unwrap();
    let looks: [&[&str]; 3] = [&["doctor"], &["image", "list"], &["image", "path", "base"]];
    for args in looks {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
        let output = command.args(args).env("XDG_CACHE_HOME", dir.path());
        output.output().unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "{args:?}");
    }
}
