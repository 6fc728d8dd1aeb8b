//! Directories copied into the guest and out of it. Nothing that a guest sends can make this write
//! outside of the target directory.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use hearth_agent::client::{AgentClient, Node, TreeEntry, TreeLimits, TreeReader, TreeWriter};
use hearth_agent::proto::{Account, Place};
use hearth_vmm::virtio::vsock::VsockStream;
use tokio::fs;
use tokio::io::empty;

use super::copies::{CopyError, MOST};

type Agent = AgentClient<VsockStream>;

/// Copies a directory of the host with everything in it; links stay links. Uses root's rights:
/// nothing has run in the guest yet that could have placed links in the way.
pub(super) async fn put(
    agent: &mut Agent,
    from: &Path,
    to: &Path,
    owner: &Account,
) -> Result<(), CopyError> {
    let mut writer = TreeWriter::begin_giving(agent, to.to_owned(), owner.clone())?;
    let mut open = vec![names(from, Path::new("")).await?];
    while let Some(names_here) = open.last_mut() {
        let Some(path) = names_here.pop() else {
            open.pop();
            continue;
        };
        let place = from.join(&path);
        let failed = |source| CopyError::read(&place, source);
        let found = fs::symlink_metadata(&place).await.map_err(failed)?;
        let mode = found.permissions().mode() & 0o777;
        let entry = |node| TreeEntry {
            path: path.clone(),
            mode,
            modified_s: 0,
            node,
        };
        if found.is_dir() {
            writer.add(&entry(Node::Dir), &mut empty()).await?;
            open.push(names(from, &path).await?);
        } else if found.is_symlink() {
            let target = fs::read_link(&place).await.map_err(failed)?;
            let link = entry(Node::Link { target });
            writer.add(&link, &mut empty()).await?;
        } else if found.is_file() {
            let mut file = fs::File::open(&place).await.map_err(failed)?;
            let node = Node::File { size: found.len() };
            writer.add(&entry(node), &mut file).await?;
        } else {
            return Err(CopyError::NotPlain(place));
        }
    }
    writer.finish().await?;
    Ok(())
}

/// The paths of a directory's entries, last first.
async fn names(top: &Path, dir: &Path) -> Result<Vec<PathBuf>, CopyError> {
    let place = top.join(dir);
    let failed = |source| CopyError::read(&place, source);
    let mut entries = fs::read_dir(&place).await.map_err(failed)?;
    let mut paths = Vec::new();
    while let Some(entry) = entries.next_entry().await.map_err(failed)? {
        paths.push(dir.join(entry.file_name()));
    }
    paths.sort_unstable_by(|one, other| other.cmp(one));
    Ok(paths)
}

/// Copies a directory of the guest into `part`, which is created. Links that lead out of it are
/// refused.
pub(super) async fn get(
    agent: &mut Agent,
    from: &Path,
    owner: &Account,
    part: &Path,
) -> Result<(), CopyError> {
    let failed = |place: &Path| {
        let place = place.to_owned();
        move |source| CopyError::written(&place, source)
    };
    let top = Place::new(from).by(owner.clone());
    let mode = agent.stat(top.clone(), true).await?.mode;
    let limits = TreeLimits {
        bytes: MOST,
        ..TreeLimits::default()
    };
    let mut reader = TreeReader::begin(agent, top, limits).await?;
    make_dir(part, mode).await.map_err(failed(part))?;
    while let Some(entry) = reader.next().await? {
        // Every directory in the path was created here by an earlier entry. A path that exists
        // already, such as a link, is an error and is never followed.
        let place = part.join(&entry.path);
        match &entry.node {
            Node::Dir => make_dir(&place, entry.mode).await.map_err(failed(&place))?,
            Node::Link { target } if leads_out(&entry.path, target) => {
                return Err(CopyError::LeadsOut {
                    link: from.join(&entry.path),
                    target: target.clone(),
                });
            }
            Node::Link { target } => {
                let made = fs::symlink(target, &place).await;
                made.map_err(failed(&place))?;
            }
            Node::File { .. } => {
                let created = fs::File::create_new(&place).await;
                let mut file = created.map_err(failed(&place))?;
                reader.content(&entry, &mut file).await?;
                let permissions = Permissions::from_mode(entry.mode & 0o777);
                let set = file.set_permissions(permissions).await;
                set.map_err(failed(&place))?;
            }
        }
    }
    Ok(())
}

/// Creates a directory with permissions that let its owner fill it.
async fn make_dir(place: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(place).await?;
    fs::set_permissions(place, Permissions::from_mode(mode & 0o777 | 0o700)).await
}

/// Whether a link may lead out of its tree. It may go upwards only at its beginning: after a name,
/// which may be a link, the position is not known.
fn leads_out(link: &Path, target: &Path) -> bool {
    let mut depth = link.components().count().saturating_sub(1);
    let mut named = false;
    for part in target.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(_) => named = true,
            Component::ParentDir if !named && depth > 0 => depth -= 1,
            _ => return true,
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_may_lead_anywhere_within_the_tree() {
        let leads_out = |link: &str, target: &str| leads_out(Path::new(link), Path::new(target));
        for (link, target) in [
            ("a", "b"),
            ("a", "./b/c"),
            ("a/b", "../c"),
            ("a/b/c", "../../d/e"),
            ("a/b", ".."),
        ] {
            assert!(!leads_out(link, target), "{link} -> {target}");
        }
        for (link, target) in [
            ("a", "/etc/passwd"),
            ("a", "/"),
            ("a", ".."),
            ("a", "../a"),
            ("a/b", "../../c"),
            // `b` may be a link to somewhere higher up.
            ("a", "b/.."),
            ("a/b", "../c/../d"),
        ] {
            assert!(leads_out(link, target), "{link} -> {target}");
        }
    }
}
