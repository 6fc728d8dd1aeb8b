//! The agent, built as one static program for the guest.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, CacheError, Key, io_error};
use crate::command::{self, CommandError};
use crate::progress::{Event, Progress, Stage, stage};

/// Names a program to use as the agent instead of building ours.
const OVERRIDE: &str = "HEARTH_AGENT";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const PROGRAM: &str = "hearth-init";
/// What the agent is made of, within the workspace.
const SOURCES: &[&str] = &["Cargo.toml", "Cargo.lock", "agent/Cargo.toml", "agent/src"];
/// The C library inside the program, and no relocations to process at start.
const RUSTFLAGS: &str = "-Ctarget-feature=+crt-static\u{1f}-Crelocation-model=static";
/// Raised when the way of building changes.
const BUILDER: &str = "2";
/// What cargo may know of the caller's environment: where it and its compilers are, and how it reaches its registry.
const CARGO: [&str; 7] = [
    "HOME",
    "CARGO_HOME",
    "CARGO_HTTP_CAINFO",
    "CARGO_HTTP_PROXY",
    "CARGO_NET_OFFLINE",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
];
/// Files larger than this are not sources of ours.
const MAX_SOURCE_BYTES: u64 = 16 << 20;

/// Why there is no agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// Neither sources nor a ready program.
    #[error(
        "the agent's sources are not where this program was built ({}): run it inside a checkout \
         of the workspace, or set HEARTH_AGENT to a statically linked hearth-init",
        workspace.display()
    )]
    NoSources {
        /// Where the workspace was when this was built.
        workspace: PathBuf,
    },
    /// The program that `HEARTH_AGENT` names cannot be used.
    #[error("HEARTH_AGENT names {}, which is not {wanted}", path.display())]
    Override {
        /// The path as given.
        path: PathBuf,
        /// What it should have been.
        wanted: &'static str,
    },
    /// cargo is missing or failed.
    #[error("cargo did not build the agent")]
    Cargo(#[from] CommandError),
    /// What was built is not what was asked for.
    #[error("the agent's sources changed while it was built: build it again")]
    Changed,
    /// Sources or cache could not be read or written.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

/// Where the agent comes from, and the hash of what it is made of.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) key: Key,
    from: From,
}

#[derive(Debug, Clone)]
enum From {
    Ready(PathBuf),
    Workspace(PathBuf),
}

/// Finds the agent's program or sources, and hashes them.
pub(crate) fn find() -> Result<Agent, AgentError> {
    if let Some(path) = std::env::var_os(OVERRIDE) {
        return ready(PathBuf::from(path));
    }
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR"));
    let home = built_in.parent().unwrap_or(built_in);
    let here = std::env::current_dir().unwrap_or_default();
    // A checkout that one stands in says more than the place of the build.
    let workspace = here
        .ancestors()
        .chain([home])
        .find(|dir| SOURCES.iter().all(|part| dir.join(part).exists()))
        .ok_or_else(|| AgentError::NoSources {
            workspace: home.to_owned(),
        })?;
    Ok(Agent {
        key: key_of(workspace)?,
        from: From::Workspace(workspace.to_owned()),
    })
}

fn ready(path: PathBuf) -> Result<Agent, AgentError> {
    let program = fs::read(&path).map_err(|_| AgentError::Override {
        path: path.clone(),
        wanted: "a file that can be read",
    })?;
    if !program.starts_with(b"\x7fELF") {
        return Err(AgentError::Override {
            path,
            wanted: "an ELF program",
        });
    }
    Ok(Agent {
        key: Key::default().part("ready", &program),
        from: From::Ready(path),
    })
}

fn key_of(workspace: &Path) -> Result<Key, AgentError> {
    let mut files = BTreeMap::new();
    for part in SOURCES {
        collect(&workspace.join(part), part, &mut files)?;
    }
    let key = Key::default()
        .part("builder", BUILDER.as_bytes())
        .part("flags", RUSTFLAGS.as_bytes());
    Ok(files
        .iter()
        .fold(key, |key, (name, content)| key.part(name, content)))
}

fn collect(
    path: &Path,
    name: &str,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> Result<(), CacheError> {
    let data = path.metadata().map_err(io_error("read", path))?;
    if data.is_dir() {
        for entry in fs::read_dir(path).map_err(io_error("read", path))? {
            let entry = entry.map_err(io_error("read", path))?;
            let name = format!("{name}/{}", entry.file_name().to_string_lossy());
            collect(&entry.path(), &name, files)?;
        }
    } else if data.len() <= MAX_SOURCE_BYTES {
        let content = fs::read(path).map_err(io_error("read", path))?;
        files.insert(name.to_owned(), content);
    }
    Ok(())
}

/// The agent's program, stripped and statically linked. Built in one place for all checkouts: at most one at a time.
pub(crate) fn build(
    cache: &Cache,
    agent: &Agent,
    progress: &dyn Progress,
) -> Result<PathBuf, AgentError> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    build_with(&cargo, cache, agent, progress)
}

fn build_with(
    cargo: &OsStr,
    cache: &Cache,
    agent: &Agent,
    progress: &dyn Progress,
) -> Result<PathBuf, AgentError> {
    let workspace = match &agent.from {
        From::Ready(path) => return Ok(path.clone()),
        From::Workspace(workspace) => workspace,
    };
    // A target directory of its own: the caller may itself run under cargo,
    // which holds the lock of the usual one.
    let target = cache.dir("work")?.join("agent");
    stage(progress, Stage::Agent, || {
        // Cargo knows sources by their names within a workspace and by their times: those of another checkout, or
        // older ones put back in this one, would be taken for what was built last.
        command::run(&mut within(cargo, workspace, &target, "clean"), |_| {})?;
        let mut cargo = within(cargo, workspace, &target, "build");
        cargo
            .args(["--no-default-features", "--bin", PROGRAM])
            .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS);
        let mut done = 0;
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
    // What it was built of has another name in the cache.
    if key_of(workspace)?.name() != agent.key.clone().name() {
        return Err(AgentError::Changed);
    }
    Ok(target.join(TARGET).join("guest").join(PROGRAM))
}

/// What cargo shall do with the agent, in a target directory of its own.
fn within(cargo: &OsStr, workspace: &Path, target: &Path, what: &str) -> Command {
    let mut cargo = command::fetcher(cargo);
    command::keep(&mut cargo, &CARGO);
    cargo
        .current_dir(workspace)
        .args([what, "--locked", "--profile", "guest"])
        .args(["--package", "hearth-agent", "--target", TARGET])
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_TERM_COLOR", "never");
    cargo
}

/// Crates that a first build of the agent compiles, about.
const STEPS: u32 = 25;

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::progress::Silent;

    /// An agent that is nowhere, by its key.
    pub(crate) fn named(name: &str) -> Agent {
        Agent {
            key: Key::default().part("ready", name.as_bytes()),
            from: From::Ready(name.into()),
        }
    }

    fn workspace() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("agent/src/bin")).unwrap();
        for file in [
            "Cargo.toml",
            "Cargo.lock",
            "agent/Cargo.toml",
            "agent/src/bin/a.rs",
        ] {
            fs::write(dir.path().join(file), file).unwrap();
        }
        dir
    }

    #[test]
    fn the_key_follows_the_agents_sources_and_nothing_else() {
        let dir = workspace();
        let key = || key_of(dir.path()).unwrap().name();
        let base = key();
        fs::create_dir(dir.path().join("vmm")).unwrap();
        fs::write(dir.path().join("vmm/lib.rs"), "changed").unwrap();
        assert_eq!(key(), base);
        fs::write(dir.path().join("agent/src/bin/a.rs"), "changed").unwrap();
        let changed = key();
        assert_ne!(changed, base);
        fs::write(dir.path().join("agent/src/bin/b.rs"), "new").unwrap();
        assert_ne!(key(), changed);
    }

    /// A workspace with an agent that says `word`.
    fn speaking(word: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str, text: &str| fs::write(dir.path().join(path), text).unwrap();
        fs::create_dir_all(dir.path().join("agent/src")).unwrap();
        at(
            "Cargo.toml",
            "[workspace]\nmembers = [\"agent\"]\nresolver = \"3\"\n[profile.guest]\ninherits = \"release\"\n",
        );
        at(
            "Cargo.lock",
            "version = 4\n[[package]]\nname = \"hearth-agent\"\nversion = \"0.1.0\"\n",
        );
        at(
            "agent/Cargo.toml",
            "[package]\nname = \"hearth-agent\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[[bin]]\nname = \"hearth-init\"\npath = \"src/main.rs\"\n",
        );
        at(
            "agent/src/main.rs",
            &format!("fn main() {{ print!(\"{word}\"); }}"),
        );
        dir
    }

    #[test]
    fn a_checkout_with_older_files_gets_an_agent_of_its_own() {
        let cache_dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(cache_dir.path().to_owned())).unwrap();
        for word in ["newer", "older"] {
            let dir = speaking(word);
            if word == "older" {
                let long_ago =
                    std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_hours(1);
                for file in ["Cargo.toml", "agent/Cargo.toml", "agent/src/main.rs"] {
                    let file = fs::File::options().write(true).open(dir.path().join(file));
                    file.unwrap().set_modified(long_ago).unwrap();
                }
            }
            let agent = Agent {
                key: key_of(dir.path()).unwrap(),
                from: From::Workspace(dir.path().to_owned()),
            };
            let program = build(&cache, &agent, &Silent).unwrap();
            let said = command::output(&mut command::tool(program)).unwrap();
            assert_eq!(said, word);
        }
    }

    #[test]
    fn what_was_built_of_other_sources_is_not_taken() {
        let dir = workspace();
        let cache = Cache::open(Some(dir.path().join("cache"))).unwrap();
        let agent = Agent {
            key: key_of(dir.path()).unwrap(),
            from: From::Workspace(dir.path().to_owned()),
        };
        let built = |script: &str| {
            let cargo = dir.path().join("cargo");
            fs::write(&cargo, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
            build_with(cargo.as_os_str(), &cache, &agent, &Silent)
        };
        built("exit 0").unwrap();
        assert!(matches!(
            built("echo more >> agent/src/bin/a.rs"),
            Err(AgentError::Changed)
        ));
        assert!(matches!(built("exit 1"), Err(AgentError::Cargo(_))));
    }

    #[test]
    fn a_ready_program_must_be_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        assert!(matches!(
            ready(path.clone()),
            Err(AgentError::Override {
                wanted: "a file that can be read",
                ..
            })
        ));
        fs::write(&path, "#!/bin/sh").unwrap();
        assert!(matches!(
            ready(path.clone()),
            Err(AgentError::Override {
                wanted: "an ELF program",
                ..
            })
        ));
        fs::write(&path, b"\x7fELFone").unwrap();
        let one = ready(path.clone()).unwrap();
        fs::write(&path, b"\x7fELFtwo").unwrap();
        assert_ne!(one.key.name(), ready(path).unwrap().key.name());
    }
}
