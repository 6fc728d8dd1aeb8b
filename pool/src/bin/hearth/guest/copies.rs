//! Files copied into the guest before its program runs, and out of it afterwards.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use hearth_agent::client::{AgentClient, FileError, TreeError};
use hearth_agent::proto::{Account, FileKind, Place, Put};
use hearth_vmm::virtio::vsock::VsockStream;
use tokio::fs;

use super::trees;

/// Most bytes that one file or directory may bring out: a guest must not fill the host's disk.
pub(super) const MOST: u64 = 4 << 30;

/// One regular file or directory to copy: its source and its destination.
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
    #[error("{}: neither a file nor a directory nor a symbolic link: leave it out", .0.display())]
    NotPlain(PathBuf),
    #[error("{}: is there already: a directory is not copied over anything", .0.display())]
    Exists(PathBuf),
    #[error(
        "{}: a link to {}, out of the directory: have a program in the guest pack it as an archive", link.display(),
        target.display()
    )]
    LeadsOut { link: PathBuf, target: PathBuf },
    #[error("{}: larger than {} GiB", .0.display(), MOST >> 30)]
    TooLarge(PathBuf),
    #[error(transparent)]
    Guest(#[from] FileError),
    #[error(transparent)]
    Tree(#[from] TreeError),
}

impl CopyError {
    pub(super) fn read(path: &Path, source: std::io::Error) -> Self {
        let (path, what) = (path.to_owned(), "read");
        Self::Host { path, what, source }
    }

    pub(super) fn written(path: &Path, source: std::io::Error) -> Self {
        let (path, what) = (path.to_owned(), "written");
        Self::Host { path, what, source }
    }
}

/// Parses `FROM:TO`. A path on the host may contain colons, one in the guest may not.
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

/// Parses `HOST:GUEST`.
pub(super) fn inward(text: &str) -> Result<Copy, String> {
    split(OsStr::new(text), true)
}

/// Parses `GUEST:HOST`.
pub(super) fn outward(text: &str) -> Result<Copy, String> {
    split(OsStr::new(text), false)
}

/// Copies the host's files and directories into the guest, with their permissions, and creates the
/// directories that they need.
pub(super) async fn put(
    agent: &mut AgentClient<VsockStream>,
    copies: &[Copy],
    owner: &Account,
) -> Result<(), CopyError> {
    for Copy { from, to } in copies {
        let failed = |source| CopyError::read(from, source);
        let metadata = fs::metadata(from).await.map_err(failed)?;
        if metadata.is_dir() {
            trees::put(agent, from, to, owner).await?;
            continue;
        }
        if !metadata.is_file() {
            return Err(CopyError::NotPlain(from.clone()));
        }
        let mut file = fs::File::open(from).await.map_err(failed)?;
        if let Some(dir) = to.parent().filter(|dir| dir.file_name().is_some()) {
            agent.make_dir(dir, 0o755, true).await?;
        }
        // Safe with root's rights: nothing has run in the guest yet that could have placed a link
        // there.
        let put = Put::new(to)
            .mode(metadata.permissions().mode() & 0o777)
            .given_to(owner.clone());
        agent.put_from(put, &mut file).await?;
    }
    Ok(())
}

/// Copies files and directories out of the guest, with their permissions. Each appears on the host
/// when it is complete: a file replaces an existing one, a directory does not.
pub(super) async fn get(
    agent: &mut AgentClient<VsockStream>,
    copies: &[Copy],
    owner: &Account,
) -> Result<(), CopyError> {
    for Copy { from, to } in copies {
        let part = Part::of(to);
        // With the rights of the program's user, whose programs may have placed links there.
        let place = Place::new(from).by(owner.clone());
        let found = agent.stat(place.clone(), true).await?;
        if found.kind == FileKind::Dir {
            if fs::symlink_metadata(to).await.is_ok() {
                return Err(CopyError::Exists(to.clone()));
            }
            trees::get(agent, from, owner, &part.0).await?;
        } else {
            get_one(agent, place, found.mode & 0o777, &part.0).await?;
        }
        let named = fs::rename(&part.0, to).await;
        named.map_err(|source| CopyError::written(to, source))?;
    }
    Ok(())
}

async fn get_one(
    agent: &mut AgentClient<VsockStream>,
    from: Place,
    mode: u32,
    part: &Path,
) -> Result<(), CopyError> {
    let failed = |source| CopyError::written(part, source);
    let mut file = fs::File::create(part).await.map_err(failed)?;
    let path = PathBuf::from(OsString::from_vec(from.path.to_vec()));
    if agent.get_into(from, 0..MOST, &mut file).await? == MOST {
        return Err(CopyError::TooLarge(path));
    }
    let permissions = std::fs::Permissions::from_mode(mode);
    file.set_permissions(permissions).await.map_err(failed)
}

/// A temporary path on the host until a copy is complete. Removed when dropped before that.
struct Part(PathBuf);

impl Part {
    fn of(to: &Path) -> Self {
        let mut name = OsString::from(".");
        name.push(to.file_name().unwrap_or_default());
        name.push(".hearth-part");
        Self(to.with_file_name(name))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // After the rename neither exists. Links are not followed.
        let _ = std::fs::remove_file(&self.0).or_else(|_| std::fs::remove_dir_all(&self.0));
    }
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
        assert_eq!(
            Part::of(Path::new("/a/b")).0,
            Path::new("/a/.b.hearth-part")
        );
        assert_eq!(Part::of(Path::new("b")).0, Path::new(".b.hearth-part"));
    }
}
