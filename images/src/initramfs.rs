//! The initramfs: an uncompressed cpio archive that holds the agent as
//! `/init`.
//!
//! It is copied into the memory of every cold-booted guest and unpacked there, entry by entry, so
//! it holds nothing else. `/dev/console` comes from the archive that is built into every kernel,
//! and the agent creates its mount points. The same agent gives the same bytes: times and inode
//! numbers are fixed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use cpio::newc::Builder;

use crate::agent::Agent;
use crate::cache::{Cache, CacheError, io_error};
use crate::progress::{Progress, Stage, stage};

const KIND: &str = "base";
const FILE: &str = "initramfs.cpio";
/// Increased when the archive's content changes for the same agent.
const LAYOUT: &str = "1";

/// Why the initramfs could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InitramfsError {
    /// The agent's program cannot be read.
    #[error("cannot read the agent {}", path.display())]
    Agent {
        /// The program.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The archive could not be written to the cache.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}

fn name(agent: &Agent) -> String {
    agent.key.clone().part("layout", LAYOUT.as_bytes()).name()
}

pub(crate) fn cached(cache: &Cache, agent: &Agent) -> Option<PathBuf> {
    let file = cache.entry(KIND, &name(agent))?.join(FILE);
    file.is_file().then_some(file)
}

/// Returns the archive for `agent`: from the cache, or made from the program that `build` builds in
/// the scratch directory passed to it.
pub(crate) fn get<E: From<InitramfsError>>(
    cache: &Cache,
    agent: &Agent,
    progress: &dyn Progress,
    build: impl FnOnce(&Path) -> Result<PathBuf, E>,
) -> Result<PathBuf, E> {
    if let Some(path) = cached(cache, agent) {
        return Ok(path);
    }
    let lock = cache.lock(KIND, progress).map_err(InitramfsError::from)?;
    match cached(cache, agent) {
        // Another process or thread has built it in the meantime.
        Some(path) => Ok(path),
        None => {
            let scratch = cache.scratch(&lock).map_err(InitramfsError::from)?;
            let program = build(scratch.path())?;
            Ok(write(cache, agent, &program, scratch.path(), progress)?)
        }
    }
}

fn write(
    cache: &Cache,
    agent: &Agent,
    program: &Path,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, InitramfsError> {
    let program = fs::read(program).map_err(|source| InitramfsError::Agent {
        path: program.to_owned(),
        source,
    })?;
    let entry = stage(progress, Stage::Initramfs, || {
        let entry = scratch.join("entry");
        fs::create_dir(&entry).map_err(io_error("create", &entry))?;
        let path = entry.join(FILE);
        File::create(&path)
            .and_then(|file| {
                let mut out = BufWriter::new(file);
                archive(&program, &mut out)?;
                out.flush()
            })
            .map_err(io_error("write", &path))?;
        cache.publish(KIND, &name(agent), &entry)
    })?;
    Ok(entry.join(FILE))
}

fn archive(init: &[u8], out: &mut impl Write) -> io::Result<()> {
    let size = u32::try_from(init.len())
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "the agent exceeds 4 GiB"))?;
    let mut file = Builder::new("init")
        .ino(1)
        .mode(0o100_755)
        .nlink(1)
        .mtime(0)
        .write(&mut *out, size);
    file.write_all(init)?;
    file.finish()?;
    cpio::newc::trailer(out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn made(init: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        archive(init, &mut out).unwrap();
        out
    }

    #[test]
    fn it_holds_the_agent_and_nothing_else() {
        let agent = b"\x7fELF and more";
        let bytes = made(agent);
        let mut reader = cpio::newc::Reader::new(bytes.as_slice()).unwrap();
        let entry = reader.entry();
        assert_eq!((entry.name(), entry.mode()), ("init", 0o100_755));
        assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        assert_eq!(content, agent);
        let rest = reader.finish().unwrap();
        assert!(cpio::newc::Reader::new(rest).unwrap().entry().is_trailer());
    }

    #[test]
    fn two_agents_that_are_built_in_one_place_at_once_are_not_mixed_up() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(Some(dir.path().join("cache"))).unwrap();
        let place = dir.path().join("program");
        std::thread::scope(|scope| {
            for name in ["one", "two", "three"] {
                let (cache, place) = (&cache, &place);
                scope.spawn(move || {
                    let build = |_: &Path| {
                        fs::write(place, name).unwrap();
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        Ok::<_, InitramfsError>(place.clone())
                    };
                    let agent = crate::agent::tests::named(name);
                    let path = get(cache, &agent, &crate::Silent, build).unwrap();
                    assert_eq!(fs::read(path).unwrap(), made(name.as_bytes()));
                });
            }
        });
    }

    #[test]
    fn a_kernel_can_take_it() {
        // The header's magic for archives without a checksum, and data padded to 4 bytes.
        assert!(made(b"agent").starts_with(b"070701"));
        assert_eq!(made(b"agent").len() % 4, 0);
    }

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        assert_eq!(made(b"agent"), made(b"agent"));
        assert_ne!(made(b"agent"), made(b"other"));
    }
}
