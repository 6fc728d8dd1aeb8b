//! The agent, built as one static program for the guest.

use std::collections::BTreeMap;
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

/// The agent's program, stripped and statically linked.
pub(crate) fn build(
    cache: &Cache,
    agent: &Agent,
    progress: &dyn Progress,
) -> Result<PathBuf, AgentError> {
    let workspace = match &agent.from {
        From::Ready(path) => return Ok(path.clone()),
        From::Workspace(workspace) => workspace,
    };
    // A target directory of its own: the caller may itself run under cargo, which holds the lock of the
    // usual one. One for each checkout: cargo takes a crate of the same place in another workspace for
    // the same, and what was built of that one for fresh if these sources are older.
    let checkout = Key::default().part("checkout", workspace.as_os_str().as_encoded_bytes());
    let target = cache.dir("work")?.join("agent").join(checkout.name());
    stage(progress, Stage::Agent, || {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // Run under cargo, its settings for our own crate are in the environment.
        for (name, _) in std::env::vars_os() {
            if name.to_str().is_some_and(|name| {
                name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_PROFILE_")
            }) {
                cargo.env_remove(name);
            }
        }
        cargo
            .current_dir(workspace)
            .args([
                "build",
                "--locked",
                "--profile",
                "guest",
                "--package",
                "hearth-agent",
            ])
            .args([
                "--no-default-features",
                "--bin",
                PROGRAM,
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(&target)
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTC_WORKSPACE_WRAPPER")
            .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS)
            .env("CARGO_TERM_COLOR", "never");
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
    Ok(target.join(TARGET).join("guest").join(PROGRAM))
}

/// Crates that a first build of the agent compiles, about.
const STEPS: u32 = 25;

#[cfg(test)]
mod tests {
    use super::*;

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

    /// A checkout whose agent is a program that prints `word`.
    fn checkout_that_says(word: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("agent/src");
        fs::create_dir_all(&source).unwrap();
        let package =
            "[package]\nname = \"hearth-agent\"\nversion = \"0.1.0\"\nedition = \"2024\"\n";
        let bin = "[[bin]]\nname = \"hearth-init\"\npath = \"src/main.rs\"\n";
        let lock = "version = 4\n\n[[package]]\nname = \"hearth-agent\"\nversion = \"0.1.0\"\n";
        let workspace = "[workspace]\nresolver = \"3\"\nmembers = [\"agent\"]\n[profile.guest]\ninherits = \"release\"\n";
        for (file, content) in [
            ("Cargo.toml", workspace.to_owned()),
            ("Cargo.lock", lock.to_owned()),
            ("agent/Cargo.toml", format!("{package}{bin}")),
            (
                "agent/src/main.rs",
                format!("fn main() {{ print!(\"{word}\") }}"),
            ),
        ] {
            fs::write(dir.path().join(file), content).unwrap();
        }
        dir
    }

    #[test]
    fn checkouts_that_share_a_cache_each_get_their_own_agent() {
        let cache = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(cache.path().to_owned())).unwrap();
        // The second is older than what is built of the first.
        let checkouts = ["one", "other"].map(|word| (checkout_that_says(word), word));
        for (checkout, word) in &checkouts {
            let workspace = checkout.path();
            let agent = Agent {
                key: key_of(workspace).unwrap(),
                from: From::Workspace(workspace.to_owned()),
            };
            let program = build(&cache, &agent, &crate::Silent).unwrap();
            let output = Command::new(program).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), *word);
        }
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
