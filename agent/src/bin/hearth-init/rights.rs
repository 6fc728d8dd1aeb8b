//! The rights with which files are accessed. With a user's rights, a trap that the user's programs
//! set for the agent (a link, a directory that is replaced by another) leads only to what they
//! could access themselves.

use alloc::vec::Vec;

use rustix::{
    io::Errno,
    process::{Gid, Uid, getgroups},
    thread::set_thread_groups,
};

use crate::{plan::Ids, sys};

/// The rights of a user; `None`: the agent's own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rights(Option<Ids>);

impl Rights {
    pub(crate) fn of(ids: Option<Ids>) -> Self {
        Self(ids)
    }

    /// Does `work` with these rights: the filesystem user and group ids and the supplementary
    /// groups, and without the capabilities that override permissions, which the kernel drops and
    /// restores with the filesystem user id (setfsuid(2)).
    ///
    /// # Errors
    /// EPERM, without doing `work`, if the agent may not take on these rights.
    pub(crate) fn with<T>(&self, work: impl FnOnce() -> T) -> Result<T, Errno> {
        let Some((uid, gid, groups)) = &self.0 else {
            return Ok(work());
        };
        let _back = Back::after(*uid, *gid, groups)?;
        Ok(work())
    }
}

/// Restores the agent's own rights on drop.
struct Back {
    uid: u32,
    gid: u32,
    /// `None` if they were not changed.
    groups: Option<Vec<Gid>>,
}

impl Back {
    fn after(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<Self, Errno> {
        let own = getgroups()?;
        let differ = own != groups;
        if differ {
            set_thread_groups(groups)?;
        }
        // From here on every return restores the rights. The group is set first, while the agent
        // still has all its capabilities.
        let back = Self {
            gid: sys::set_fs_gid(gid.as_raw()),
            uid: sys::set_fs_uid(uid.as_raw()),
            groups: differ.then_some(own),
        };
        // setfsuid and setfsgid do not report failure.
        match (sys::fs_uid(), sys::fs_gid()) == (uid.as_raw(), gid.as_raw()) {
            true => Ok(back),
            false => Err(Errno::PERM),
        }
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        sys::set_fs_uid(self.uid);
        sys::set_fs_gid(self.gid);
        if let Some(groups) = &self.groups {
            let _ = set_thread_groups(groups);
        }
    }
}
