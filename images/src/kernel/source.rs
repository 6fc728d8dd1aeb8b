//! The kernel's source: a Debian package, downloaded by apt (which checks its
//! signature) and never installed.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use super::KernelError;
use crate::cache::io_error;
use crate::command::{self, CommandError};
use crate::progress::{Event, Progress, Stage};

/// The package name; one long-term series, so that a newer version of it
/// takes our patches or fails to.
const PACKAGE: &str = "linux-source-6.12";
/// The version that our patches were made on. Others are taken only if apt no
/// longer has this one.
pub(super) const PINNED: &str = "6.12.117-1~deb12u1";

/// A downloaded source package.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) version: String,
    pub(super) file: PathBuf,
}

/// Downloads the pinned version into `dir`, or else the newest that apt
/// knows, unless it is there already.
pub(super) fn fetch(dir: &Path, progress: &dyn Progress) -> Result<Package, KernelError> {
    if let Some(package) = downloaded(dir, PINNED) {
        return Ok(package);
    }
    progress.event(Event::Begin(Stage::Fetch));
    let package = match download(dir, PINNED) {
        Ok(package) => package,
        Err(KernelError::Command(error)) => newest(dir, error)?,
        Err(error) => return Err(error),
    };
    progress.event(Event::End(Stage::Fetch));
    Ok(package)
}

/// apt could not fetch the pinned version: for `error`, or because its mirror
/// moved on to another one.
fn newest(dir: &Path, error: CommandError) -> Result<Package, KernelError> {
    let known = command::output(command::tool("apt-cache").args(["madison", PACKAGE]))?;
    match newest_known(&known) {
        None => Err(KernelError::NoSource),
        // It is the right one, so something else is wrong: the network, say.
        Some(version) if version == PINNED => Err(error.into()),
        Some(version) => {
            tracing::warn!(
                pinned = PINNED,
                version,
                "apt no longer has the pinned kernel source, taking the newest"
            );
            downloaded(dir, &version).map_or_else(|| download(dir, &version), Ok)
        }
    }
}

/// The newest version in the output of `apt-cache madison`.
fn newest_known(madison: &str) -> Option<String> {
    madison
        .lines()
        .filter_map(|line| {
            let mut columns = line.split('|').map(str::trim);
            (columns.next() == Some(PACKAGE)).then(|| columns.next())?
        })
        .max_by(|a, b| compare(a, b))
        .map(str::to_owned)
}

/// Orders versions by the numbers in them. Enough within one series of one
/// package; dpkg's full rules are not needed to choose among those.
fn compare(a: &str, b: &str) -> Ordering {
    let numbers = |version: &str| -> Vec<u64> {
        version
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|digits| digits.parse().ok())
            .collect()
    };
    numbers(a).cmp(&numbers(b))
}

fn path_of(dir: &Path, version: &str) -> PathBuf {
    dir.join(format!("{PACKAGE}_{version}_all.deb"))
}

fn downloaded(dir: &Path, version: &str) -> Option<Package> {
    let file = path_of(dir, version);
    file.is_file().then(|| Package {
        version: version.to_owned(),
        file,
    })
}

fn download(dir: &Path, version: &str) -> Result<Package, KernelError> {
    let part = tempfile::Builder::new()
        .prefix("part-")
        .tempdir_in(dir)
        .map_err(io_error("create a directory in", dir))?;
    command::run(
        command::fetcher("apt-get")
            .args(["-q", "download", &format!("{PACKAGE}={version}")])
            .current_dir(part.path()),
        |_| {},
    )?;
    // apt writes an epoch's colon as %3a; whatever it chose, it is the one.
    let mut files = fs::read_dir(part.path()).map_err(io_error("read", part.path()))?;
    let file = files
        .find_map(|entry| {
            let path = entry.ok()?.path();
            (path.extension()? == "deb").then_some(path)
        })
        .ok_or_else(|| KernelError::Package {
            version: version.to_owned(),
            missing: "file after its download",
        })?;
    let to = path_of(dir, version);
    fs::rename(&file, &to).map_err(io_error("publish", &to))?;
    Ok(Package {
        version: version.to_owned(),
        file: to,
    })
}

/// Unpacks the source tree into `to`, which must not exist.
pub(super) fn unpack(package: &Package, scratch: &Path, to: &Path) -> Result<(), KernelError> {
    let deb = scratch.join("deb");
    command::run(
        command::tool("dpkg-deb")
            .arg("-x")
            .arg(&package.file)
            .arg(&deb),
        |_| {},
    )?;
    let tarball = deb.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
    if !tarball.is_file() {
        return Err(KernelError::Package {
            version: package.version.clone(),
            missing: "usr/src/linux-source-6.12.tar.xz",
        });
    }
    fs::create_dir(to).map_err(io_error("create", to))?;
    command::run(
        command::tool("tar")
            .arg("-xJf")
            .arg(&tarball)
            .arg("-C")
            .arg(to)
            .args(["--strip-components=1", "--no-same-owner"]),
        |_| {},
    )?;
    fs::remove_dir_all(&deb).map_err(io_error("remove", &deb))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_that_apt_knows() {
        let known = "\
 linux-source-6.12 | 6.12.99-1~deb12u1 | http://deb.debian.org/debian-security x/main Packages
 linux-source-6.12 | 6.12.117-1~deb12u1 | http://deb.debian.org/debian-security x/main Packages
 linux-source-6.12 | 6.12.115-2~deb12u1 | http://deb.debian.org/debian-security x/main Packages
linux-source-6.12 | 6.12.200-1 | http://deb.debian.org/debian x/main Sources
other | 7.0 | http://deb.debian.org/debian x/main Packages
";
        assert_eq!(newest_known(known).as_deref(), Some("6.12.200-1"));
        assert_eq!(newest_known(""), None);
        assert_eq!(newest_known("N: Unable to locate package\n"), None);
    }

    #[test]
    fn a_download_that_is_there_is_not_repeated() {
        let dir = tempfile::tempdir().unwrap();
        assert!(downloaded(dir.path(), PINNED).is_none());
        fs::write(path_of(dir.path(), PINNED), b"deb").unwrap();
        struct Deaf;
        impl Progress for Deaf {
            fn event(&self, event: Event) {
                panic!("nothing was to be done: {event:?}");
            }
        }
        let package = fetch(dir.path(), &Deaf).unwrap();
        assert_eq!(package.version, PINNED);
    }
}
