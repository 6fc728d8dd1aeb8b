//! Fetches the files of locked packages and keeps them in the cache under their hashes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{DebianError, mirror};
use crate::cache::io_error;
use crate::command::{self, CommandError};
use crate::lock::Package;
use crate::progress::{Event, Progress, Stage, stage};

/// apt's tool that downloads single files with apt's network settings, and checks their hashes.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// Settings of a download: where packages come from, and where their files are kept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Download<'a> {
    /// Debian's suite. It decides which archive is used: the one of releases, or the one of
    /// security updates.
    pub(crate) suite: &'a str,
    /// The directory that keeps files under their hashes.
    pub(crate) dir: &'a Path,
    /// The directory for partial downloads, on the same file system as `dir`.
    pub(crate) scratch: &'a Path,
    /// The stage that is reported to `Progress`.
    pub(crate) stage: Stage,
}

impl Download<'_> {
    /// Returns the file of each package, in the order of `packages`. Files that are missing or
    /// damaged are fetched.
    pub(crate) fn fetch(
        self,
        packages: &[Package],
        progress: &dyn Progress,
    ) -> Result<Vec<PathBuf>, DebianError> {
        let files: Vec<PathBuf> = packages
            .iter()
            .map(|package| file_in(self.dir, package))
            .collect();
        let mut missing = Vec::new();
        for (package, file) in packages.iter().zip(&files) {
            if !has(file, &package.sha256).map_err(io_error("read", file))? {
                missing.push(package);
            }
        }
        if !missing.is_empty() {
            let mirrors = mirror::mirrors(self.suite)?;
            stage(progress, self.stage, || {
                self.fetch_from(&mirrors, &missing, progress)
            })?;
        }
        Ok(files)
    }

    fn fetch_from(
        self,
        mirrors: &[String],
        packages: &[&Package],
        progress: &dyn Progress,
    ) -> Result<(), DebianError> {
        let mut missing = packages.to_vec();
        let mut failure = None;
        for mirror in mirrors {
            match self.fetch_from_one(mirror, &missing, progress) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    missing.retain(|package| !file_in(self.dir, package).exists());
                    // The error of the first, most likely mirror is the one to report.
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or(DebianError::NoMirror))
    }

    fn fetch_from_one(
        self,
        mirror: &str,
        packages: &[&Package],
        progress: &dyn Progress,
    ) -> Result<(), DebianError> {
        let part = tempfile::Builder::new()
            .prefix("part-")
            .tempdir_in(self.scratch)
            .map_err(io_error("create a directory in", self.scratch))?;
        let mut helper = command::fetcher(HELPER);
        // As root, apt would switch to its sandbox user, which cannot write here.
        helper.args(["-q", "-o", "APT::Sandbox::User=root", "download-file"]);
        for package in packages {
            helper
                .arg(format!("{mirror}/{}", package.path))
                .arg(file_in(part.path(), package))
                .arg(format!("SHA256:{}", package.sha256));
        }
        let total = u32::try_from(packages.len()).unwrap_or(u32::MAX);
        let mut done = 0;
        let fetched = command::run(&mut helper, |line| {
            if line.starts_with("Get:") && done < total {
                done += 1;
                let stage = self.stage;
                progress.event(Event::Step { stage, done, total });
            }
        });
        let mut lacking = Vec::new();
        for package in packages {
            let (from, to) = (file_in(part.path(), package), file_in(self.dir, package));
            // apt gives a file this name only if its hash is right.
            match publish(&from, &to) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => lacking.push(*package),
                result => result.map_err(io_error("publish", &to))?,
            }
        }
        match fetched {
            Err(error) if !lacking.is_empty() => Err(failed(&lacking, error)),
            Err(error) => Err(error.into()),
            Ok(()) => Ok(()),
        }
    }
}

fn file_in(dir: &Path, package: &Package) -> PathBuf {
    dir.join(format!("{}.deb", package.sha256))
}

/// Returns whether the file is there. A file with another hash is removed.
fn has(file: &Path, sha256: &str) -> io::Result<bool> {
    let mut hash = Sha256::new();
    match fs::File::open(file) {
        Ok(mut file) => io::copy(&mut file, &mut hash)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let digits = hash.finalize();
    let digits: String = digits.iter().map(|byte| format!("{byte:02x}")).collect();
    if digits == sha256 {
        return Ok(true);
    }
    fs::remove_file(file)?;
    Ok(false)
}

/// Moves a fetched file into the cache. For a mirror that is a local directory, apt makes a link:
/// the content is copied then.
fn publish(from: &Path, to: &Path) -> io::Result<()> {
    if from.symlink_metadata()?.is_symlink() {
        let whole = from.with_extension("copy");
        fs::copy(from, &whole)?;
        return fs::rename(&whole, to);
    }
    fs::rename(from, to)
}

fn failed(lacking: &[&Package], source: CommandError) -> DebianError {
    let said = match &source {
        CommandError::Failed { tail, .. } => tail.as_str(),
        CommandError::Start { .. } => "",
    };
    let named = |package: &&Package| format!("{} {}", package.name, package.version);
    // One line of apt's output has the address and the reason.
    let lacks = |why: &str| -> Vec<String> {
        let said_of = |package: &&&Package| {
            let mut lines = said.lines();
            lines.any(|line| line.contains(&package.path) && line.contains(why))
        };
        lacking.iter().filter(said_of).map(named).collect()
    };
    let (gone, others) = (lacks("404"), lacks("Hash Sum mismatch"));
    match (gone.is_empty(), others.is_empty()) {
        (false, _) => DebianError::Vanished { packages: gone },
        (_, false) => {
            let packages = others;
            DebianError::Mismatch { packages, source }
        }
        _ => {
            let packages = lacking.iter().map(named).collect();
            DebianError::Fetch { packages, source }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;

    /// Writes a package to a local archive directory: apt takes `file:` addresses.
    fn package(archive: &Path, name: &str, content: &[u8]) -> Package {
        let path = format!("pool/{name}_1%2b2_all.deb");
        fs::create_dir_all(archive.join("pool")).unwrap();
        fs::write(archive.join(format!("pool/{name}_1+2_all.deb")), content).unwrap();
        let sha256 = Sha256::digest(content)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let (name, version) = (name.to_owned(), "1+2".to_owned());
        Package {
            name,
            version,
            path,
            sha256,
        }
    }

    fn into<'a>(dir: &'a Path, scratch: &'a Path) -> Download<'a> {
        Download {
            suite: "none",
            dir,
            scratch,
            stage: Stage::Packages,
        }
    }

    fn there_is_apt() -> bool {
        let there = Path::new(HELPER).exists();
        if !there {
            use std::io::Write;
            let _ = io::stderr().write_all(b"\nNOT MEASURED: no apt\n");
        }
        there
    }

    #[test]
    fn packages_are_fetched_once_and_again_when_the_cache_is_damaged() {
        if !there_is_apt() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (archive, cache) = (dir.path().join("archive"), dir.path().join("cache"));
        fs::create_dir(&cache).unwrap();
        let (one, two) = (
            package(&archive, "one", b"1"),
            package(&archive, "two", b"2"),
        );
        // The first mirror does not exist.
        let mirrors = [
            "file:/nowhere".to_owned(),
            format!("file:{}", archive.display()),
        ];
        let download = into(&cache, dir.path());
        download
            .fetch_from(&mirrors, &[&one, &two], &Silent)
            .unwrap();
        let packages = [one, two];
        // No mirror is asked for cached files.
        let files = download.fetch(&packages, &Silent).unwrap();
        assert_eq!(fs::read(&files[1]).unwrap(), b"2");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 2);
        fs::write(&files[1], b"other").unwrap();
        assert!(!has(&files[1], &packages[1].sha256).unwrap());
        let again = download.fetch_from(&mirrors, &[&packages[1]], &Silent);
        again.unwrap();
        assert_eq!(fs::read(&files[1]).unwrap(), b"2");
    }

    #[test]
    fn what_is_not_as_locked_is_not_taken() {
        if !there_is_apt() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (archive, cache) = (dir.path().join("archive"), dir.path().join("cache"));
        fs::create_dir(&cache).unwrap();
        let (good, mut bad) = (
            package(&archive, "good", b"1"),
            package(&archive, "bad", b"2"),
        );
        bad.sha256 = "0".repeat(64);
        let mirrors = [format!("file:{}", archive.display())];
        let error = into(&cache, dir.path())
            .fetch_from(&mirrors, &[&good, &bad], &Silent)
            .unwrap_err();
        let DebianError::Mismatch { packages, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(packages, ["bad 1+2"]);
        assert!(has(&file_in(&cache, &good), &good.sha256).unwrap());
        assert!(!file_in(&cache, &bad).exists());
    }

    #[test]
    fn a_version_that_vanished_is_told_from_a_network_that_fails() {
        let package = Package {
            name: "jq".to_owned(),
            version: "1.6".to_owned(),
            path: "pool/main/j/jq/jq_1.6_amd64.deb".to_owned(),
            sha256: String::new(),
        };
        let said = |tail: &str| CommandError::Failed {
            program: "apt-helper".to_owned(),
            status: std::process::ExitStatus::default(),
            tail: tail.to_owned(),
        };
        let gone = "E: Failed to fetch http://m.example/debian/pool/main/j/jq/jq_1.6_amd64.deb  404  Not Found";
        let error = failed(&[&package], said(gone)).to_string();
        assert!(error.contains("no longer has jq 1.6"), "{error}");
        let other = "E: Failed to fetch http://m.example/debian/pool/main/j/jq/jq_1.6_amd64.deb  Could not resolve";
        assert!(matches!(
            failed(&[&package], said(other)),
            DebianError::Fetch { .. }
        ));
    }
}
