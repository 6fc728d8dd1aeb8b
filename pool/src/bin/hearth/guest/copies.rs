//! Files that go into the guest before its program runs, and come out of it after.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hearth_agent::client::{AgentClient, FileError};
use hearth_agent::proto::Put;
use hearth_vmm::virtio::vsock::VsockStream;
use tokio::fs;

/// Bytes that one file may bring out: a guest must not fill the host's disk.
const MOST: u64 = 4 << 30;

/// One regular file and its two places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("{}: cannot be {what}", path.display())]
    Host {
        path: PathBuf,
        what: &'static str,
        source: std::io::Error,
    },
    #[error("{}: not a regular file; pack a directory into an archive first", .0.display())]
    NotAFile(PathBuf),
    #[error("{}: larger than {} GiB", .0.display(), MOST >> 30)]
    TooLarge(PathBuf),
    #[error(transparent)]
    Guest(#[from] FileError),
}

/// `FROM:TO`. A host's path may have colons, a guest's may not.
fn split(text: &OsStr, last: bool) -> Result<Copy, String> {
    let bytes = text.as_bytes();
    let is_colon = |byte: &u8| *byte == b':';
    let colon = match last {
        true => bytes.iter().rposition(is_colon),
        false => bytes.iter().position(is_colon),
    };
    let parts = colon.and_then(|colon| Some((bytes.get(..colon)?, bytes.get(colon + 1..)?)));
    match parts {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok(Copy {
            from: OsString::from_vec(from.to_vec()).into(),
            to: OsString::from_vec(to.to_vec()).into(),
        }),
        _ => Err("give two paths with a colon between them".to_owned()),
    }
}

/// `HOST:GUEST`
pub(super) fn inward(text: &str) -> Result<Copy, String> {
    split(OsStr::new(text), true)
}

/// `GUEST:HOST`
pub(super) fn outward(text: &str) -> Result<Copy, String> {
    split(OsStr::new(text), false)
}

/// Puts the host's files into the guest, with their permissions, and makes the directories that they need.
pub(super) async fn put(
    agent: &mut AgentClient<VsockStream>,
    copies: &[Copy],
) -> Result<(), CopyError> {
    for Copy { from, to } in copies {
        let failed = |what, source| CopyError::Host {
            path: from.clone(),
            what,
            source,
        };
        let opened = fs::File::open(from).await;
        let mut file = opened.map_err(|error| failed("read", error))?;
        let metadata = file
            .metadata()
            .await
            .map_err(|error| failed("read", error))?;
        if !metadata.is_file() {
            return Err(CopyError::NotAFile(from.clone()));
        }
        if let Some(dir) = to.parent().filter(|dir| dir.file_name().is_some()) {
            agent.make_dir(dir, 0o755, true).await?;
        }
        let put = Put::new(to).mode(metadata.permissions().mode() & 0o777);
        agent.put_from(put, &mut file).await?;
    }
    Ok(())
}

/// Takes files of the guest, with their permissions; each replaces the host's when it is complete.
pub(super) async fn get(
    agent: &mut AgentClient<VsockStream>,
    copies: &[Copy],
) -> Result<(), CopyError> {
    for Copy { from, to } in copies {
        let part = part_of(to);
        let got = get_one(agent, from, &part).await;
        let named = match got {
            Ok(()) => fs::rename(&part, to)
                .await
                .map_err(|source| CopyError::Host {
                    path: to.clone(),
                    what: "written",
                    source,
                }),
            Err(error) => Err(error),
        };
        if named.is_err() {
            // It may not be there.
            let _ = fs::remove_file(&part).await;
        }
        named?;
    }
    Ok(())
}

async fn get_one(
    agent: &mut AgentClient<VsockStream>,
    from: &Path,
    part: &Path,
) -> Result<(), CopyError> {
    let failed = |source| CopyError::Host {
        path: part.to_owned(),
        what: "written",
        source,
    };
    let mode = agent.stat(from, true).await?.mode & 0o777;
    let mut file = fs::File::create(part).await.map_err(failed)?;
    if agent.get_into(from, 0..MOST, &mut file).await? == MOST {
        return Err(CopyError::TooLarge(from.to_owned()));
    }
    let permissions = std::fs::Permissions::from_mode(mode);
    file.set_permissions(permissions).await.map_err(failed)
}

/// Where a file is until it is complete.
fn part_of(to: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(to.file_name().unwrap_or_default());
    name.push(".hearth-part");
    to.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_paths_and_a_colon() {
        let copy = |from: &str, to: &str| {
            Ok(Copy {
                from: from.into(),
                to: to.into(),
            })
        };
        assert_eq!(inward("a:/b"), copy("a", "/b"));
        assert_eq!(inward("C:a:/b"), copy("C:a", "/b"));
        assert_eq!(outward("/b:C:a"), copy("/b", "C:a"));
        for wrong in ["", "a", ":", "a:", ":b"] {
            assert!(inward(wrong).is_err() && outward(wrong).is_err(), "{wrong}");
        }
        assert_eq!(part_of(Path::new("/a/b")), Path::new("/a/.b.hearth-part"));
        assert_eq!(part_of(Path::new("b")), Path::new(".b.hearth-part"));
    }
}
