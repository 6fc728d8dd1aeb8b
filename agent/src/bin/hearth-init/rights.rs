//! With whose rights files are worked on. What a user's programs lay in the way of the agent (a
//! link, a directory that is another one the next moment) then leads to nothing that they could not
//! reach themselves.

use alloc::vec::Vec;

use rustix::{
    io::Errno,
    process::{Gid, Uid, getgroups},
    thread::set_thread_groups,
};

use crate::{plan::Ids, sys};

/// Somebody's rights; none: the agent's own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rights(Option<Ids>);

impl Rights {
    pub(crate) fn of(ids: Option<Ids>) -> Self {
        Self(ids)
    }

    /// Does some work with these rights: the user and group that file systems see, and the groups;
    /// without the capabilities that go past permissions, which the kernel takes and gives back
    /// with that user (setfsuid(2)).
    ///
    /// # Errors
    /// EPERM, before anything is done, if the agent may not take them on.
    pub(crate) fn with<T>(&self, work: impl FnOnce() -> T) -> Result<T, Errno> {
        let Some((uid, gid, groups)) = &self.0 else {
            return Ok(work());
        };
        let _back = Back::after(*uid, *gid, groups)?;
        Ok(work())
    }
}

/// Gives the agent its own rights back.
struct Back {
    uid: u32,
    gid: u32,
    /// None: they were not changed.
    groups: Option<Vec<Gid>>,
}

impl Back {
    fn after(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<Self, Errno> {
        let own = getgroups()?;
        let differ = own != groups;
        if differ {
            set_thread_groups(groups)?;
        }
        // From here on all is given back on every way out. The group first: it takes a right of the
        // agent's to change it.
        let back = Self {
            gid: sys::set_fs_gid(gid.as_raw()),
            uid: sys::set_fs_uid(uid.as_raw()),
            groups: differ.then_some(own),
        };
        // These calls do not say whether they did it.
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
