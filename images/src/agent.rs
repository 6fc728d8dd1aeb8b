//! Builds the agent as one static program for the guest, from the sources that are embedded in this
//! crate (see `build.rs`), in the scratch directory of the build. No checkout, no directory of the
//! caller, and no cargo settings in it have any influence.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cache::{CacheError, Key, io_error};
use crate::command::{self, CommandError};
use crate::progress::{Event, Progress, Stage, stage};

/// The environment variable that names a program to use as the agent instead of building ours.
const OVERRIDE: &str = "HEARTH_AGENT";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROGRAM: &str = "hearth-init";
/// The names and contents of the files of a workspace that has only the agent.
const SOURCES: Sources = include!(concat!(env!("OUT_DIR"), "/agent-sources.rs"));
/// Links the C library statically, and avoids relocations at start.
const RUSTFLAGS: &str = "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static";
/// Increased when the way of building changes.
const BUILDER: &str = "3";
/// Variables of the caller's environment that cargo gets: the locations of cargo and of its
/// compilers, and how it reaches its registry.
const CARGO: [&str; 7] = [
    "HOME",
    "CARGO_HOME",
    "CARGO_HTTP_CAINFO",
    "CARGO_HTTP_PROXY",
    "CARGO_NET_OFFLINE",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
];

type Sources = &'static [(&'static str, &'static [u8])];

/// Why the agent could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// The program that `HEARTH_AGENT` names cannot be used.
    #[error("HEARTH_AGENT names {}, which is not {wanted}", path.display())]
    Override {
        /// The path as given.
        path: PathBuf,
        /// The kind of file that is required.
        wanted: &'static str,
    },
    /// cargo is missing or failed.
    #[error(
        "cargo did not build the agent; a Rust toolchain is needed once (https://rustup.rs), or HEARTH_AGENT, the path \
         of a statically linked hearth-init"
    )]
    Cargo(#[from] CommandError),
    /// The cache could not be read or written.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

/// The origin of the agent, and the hash of its inputs.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) key: Key,
    from: From,
}

#[derive(Debug, Clone)]
enum From {
    Ready(PathBuf),
    Sources(Sources),
}

/// Returns the program that the variable names, or else the embedded sources, with their hash.
pub(crate) fn find() -> Result<Agent, AgentError> {
    match std::env::var_os(OVERRIDE) {
        Some(path) => ready(PathBuf::from(path)),
        None => Ok(of_sources(SOURCES)),
    }
}

fn of_sources(sources: Sources) -> Agent {
    let key = Key::default()
        .part("builder", BUILDER.as_bytes())
        .part("flags", RUSTFLAGS.as_bytes());
    Agent {
        key: sources
            .iter()
            .fold(key, |key, (name, content)| key.part(name, content)),
        from: From::Sources(sources),
    }
}

fn ready(path: PathBuf) -> Result<Agent, AgentError> {
    let refused = |wanted| AgentError::Override {
        path: path.clone(),
        wanted,
    };
    let program = fs::read(&path).map_err(|_| refused("a file that can be read"))?;
    match needs_interpreter(&program) {
        None => Err(refused("an ELF program for x86-64")),
        // The guest has no file but this one, so no dynamic linker.
        Some(true) => Err(refused("statically linked")),
        Some(false) => Ok(Agent {
            key: Key::default().part("ready", &program),
            from: From::Ready(path),
        }),
    }
}

/// Returns whether the program needs a dynamic linker, which a program header names, or `None` if
/// it is not a program for x86-64. Offsets are those of `Elf64_Ehdr` and `Elf64_Phdr` (elf.h).
fn needs_interpreter(program: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    const EM_X86_64: u16 = 62;
    fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
        bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }
    let half = |at| Some(u16::from_le_bytes(field(program, at)?));
    // ELFCLASS64, ELFDATA2LSB.
    if !program.starts_with(b"\x7fELF\x02\x01") || half(18)? != EM_X86_64 {
        return None;
    }
    let table = usize::try_from(u64::from_le_bytes(field(program, 32)?)).ok()?;
    let (size, count) = (usize::from(half(54)?), usize::from(half(56)?));
    let headers = program.get(table..)?;
    for index in 0..count {
        if u32::from_le_bytes(field(headers, index * size)?) == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

/// Builds the agent, stripped and statically linked, in `scratch`, an empty directory.
pub(crate) fn build(
    scratch: &Path,
    agent: &Agent,
    progress: &dyn Progress,
) -> Result<PathBuf, AgentError> {
    // Cargo sets this variable to its own path for programs that it runs.
    let cargo = std::env::var_os("CARGO").filter(|cargo| Path::new(cargo).is_absolute());
    build_with(
        cargo.as_deref().unwrap_or(OsStr::new("cargo")),
        scratch,
        agent,
        progress,
    )
}

fn build_with(
    cargo: &OsStr,
    scratch: &Path,
    agent: &Agent,
    progress: &dyn Progress,
) -> Result<PathBuf, AgentError> {
    let sources = match agent.from {
        From::Ready(ref path) => return Ok(path.clone()),
        From::Sources(sources) => sources,
    };
    let (workspace, target) = (scratch.join("agent"), scratch.join("target"));
    write(sources, &workspace)?;
    let mut cargo = command::fetcher(cargo);
    command::keep(&mut cargo, &CARGO);
    // Cargo searches for settings from its working directory upwards. That is `/`, and not this
    // one. `--locked` is not used: the lock contains all that the agent needs, so no other versions
    // are taken. But it also contains more, which cargo drops from its copy.
    cargo
        .args(["build", "--profile", "guest", "--manifest-path"])
        .arg(workspace.join("Cargo.toml"))
        .args(["--package", "hearth-agent", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target)
        .args(["--no-default-features", "--bin", PROGRAM])
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS)
        .env("CARGO_TERM_COLOR", "never");
    let mut done = 0;
    stage(progress, Stage::Agent, || {
        command::run(&mut cargo, |line| {
            if line.trim_start().starts_with("Compiling") && done < STEPS {
                done += 1;
                progress.event(Event::Step {
                    stage: Stage::Agent,
                    done,
                    total: STEPS,
                });
            }
        })
    })?;
    Ok(target.join(TARGET).join("guest").join(PROGRAM))
}

fn write(sources: Sources, workspace: &Path) -> Result<(), CacheError> {
    for (name, content) in sources {
        let path = workspace.join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        }
        fs::write(&path, content).map_err(io_error("write", &path))?;
    }
    Ok(())
}

/// The approximate number of crates that a first build of the agent compiles.
const STEPS: u32 = 25;

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::progress::Silent;

    /// Returns an agent with a key of this name. Its program does not exist.
    pub(crate) fn named(name: &str) -> Agent {
        Agent {
            key: Key::default().part("ready", name.as_bytes()),
            from: From::Ready(name.into()),
        }
    }

    #[test]
    fn the_sources_are_the_agents_and_all_of_them() {
        fn count(dir: &Path) -> usize {
            let entries = fs::read_dir(dir)
                .unwrap()
                .map(|entry| entry.unwrap().path());
            entries
                .map(|path| if path.is_dir() { count(&path) } else { 1 })
                .sum()
        }
        let agent = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agent");
        let mut others = Vec::new();
        for (name, content) in SOURCES {
            match name.strip_prefix("agent/") {
                Some(file) => assert!(fs::read(agent.join(file)).unwrap() == *content, "{name}"),
                None => others.push(*name),
            }
        }
        assert_eq!(others, ["Cargo.lock", "Cargo.toml"]);
        // Plus the manifest and the build script.
        assert_eq!(SOURCES.len(), others.len() + count(&agent.join("src")) + 2);
    }

    #[test]
    fn the_key_follows_each_source() {
        let key = |sources: Sources| of_sources(sources).key.name();
        let base = key(&[("Cargo.toml", b"a"), ("agent/src/a.rs", b"b")]);
        for other in [
            key(&[("Cargo.toml", b"a")]),
            key(&[("Cargo.toml", b"a"), ("agent/src/a.rs", b"c")]),
            key(&[("Cargo.toml", b"a"), ("agent/src/b.rs", b"b")]),
        ] {
            assert_ne!(base, other);
        }
    }

    /// An agent that prints a word, and has no dependencies to fetch.
    const SPEAKING: Sources = &[
        (
            "Cargo.toml",
            b"[workspace]\nmembers = ['agent']\nresolver = '3'\n[profile.guest]\ninherits = 'release'\n",
        ),
        (
            "Cargo.lock",
            b"version = 4\n[[package]]\nname = 'hearth-agent'\nversion = '0.1.0'\n",
        ),
        (
            "agent/Cargo.toml",
            b"[package]\nname = 'hearth-agent'\nversion = '0.1.0'\nedition = '2024'\n[[bin]]\nname = 'hearth-init'\npath = 'src/main.rs'\n",
        ),
        ("agent/src/main.rs", b"fn main() { print!(\"word\"); }"),
    ];

    #[test]
    fn settings_around_the_scratch_have_no_say() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at(".cargo")).unwrap();
        let config = "[build]\nrustc-wrapper = '/no/such/program'\n";
        fs::write(at(".cargo/config.toml"), config).unwrap();
        fs::write(at("Cargo.toml"), "[workspace]\nmembers = ['none']\n").unwrap();
        fs::write(at("rust-toolchain"), "none").unwrap();
        let scratch = at("scratch");
        fs::create_dir(&scratch).unwrap();
        let program = build(&scratch, &of_sources(SPEAKING), &Silent).unwrap();
        let said = command::output(&mut command::tool(program)).unwrap();
        assert_eq!(said, "word");
    }

    #[test]
    fn the_environment_has_no_say() {
        let test = "agent::tests::the_environment_has_no_say";
        if command::tests::is_child() {
            let scratch = std::env::current_dir().unwrap();
            build(&scratch, &of_sources(SPEAKING), &Silent).unwrap();
            return;
        }
        let program = |hostile: &[(&str, &str)]| {
            let dir = tempfile::tempdir().unwrap();
            let mut again = command::tests::again(test);
            command::keep(&mut again, &CARGO);
            again.envs(hostile.iter().copied()).current_dir(&dir);
            command::run(&mut again, |_| {}).unwrap();
            let built = format!("target/{TARGET}/guest/{PROGRAM}");
            fs::read(dir.path().join(built)).unwrap()
        };
        let plain = program(&[]);
        let hostile = program(&[
            ("CARGO", "cargo"),
            ("CARGO_BUILD_RUSTC", "/no/such/program"),
            ("CARGO_ENCODED_RUSTFLAGS", "-Cno-such-flag"),
            ("CARGO_PROFILE_GUEST_DEBUG", "2"),
            ("CARGO_TARGET_DIR", "/no/such/dir"),
            ("CARGO_UNSTABLE_NO_SUCH", "1"),
            ("CPATH", "/nowhere"),
            ("RUSTC", "/no/such/program"),
            ("RUSTC_WRAPPER", "/no/such/program"),
            ("RUSTFLAGS", "-Cno-such-flag"),
            ("LIBRARY_PATH", "/nowhere"),
        ]);
        assert!(plain == hostile);
    }

    #[test]
    fn what_cargo_says_is_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let cargo = dir.path().join("cargo");
        fs::write(&cargo, "#!/bin/sh\necho no network; exit 1\n").unwrap();
        fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
        let agent = of_sources(SPEAKING);
        let error = build_with(cargo.as_os_str(), dir.path(), &agent, &Silent).unwrap_err();
        let AgentError::Cargo(source) = &error else {
            panic!("{error:?}");
        };
        assert!(source.to_string().ends_with("no network"), "{source}");
        assert!(error.to_string().contains("HEARTH_AGENT"), "{error}");
    }

    #[test]
    fn a_ready_program_must_be_one_that_runs_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let refused = |wanted: &str| {
            let error = ready(path.clone()).unwrap_err();
            assert!(error.to_string().ends_with(wanted), "{error}");
        };
        refused("a file that can be read");
        for none in [
            "#!/bin/sh",
            "\x7fELF",
            "\x7fELF\x02\x01 and no more than this",
        ] {
            fs::write(&path, none).unwrap();
            refused("an ELF program for x86-64");
        }
        fs::copy("/bin/sh", &path).unwrap();
        refused("statically linked");
        // An ELF header without program headers.
        let mut program = vec![0; 64];
        program[..6].copy_from_slice(b"\x7fELF\x02\x01");
        program[18] = 62;
        fs::write(&path, &program).unwrap();
        let one = ready(path.clone()).unwrap();
        program.push(1);
        fs::write(&path, program).unwrap();
        assert_ne!(one.key.name(), ready(path).unwrap().key.name());
    }
}
