//! The guest's users, by `/etc/passwd` and `/etc/group`.

use alloc::{borrow::ToOwned, vec, vec::Vec};

use hearth_agent::proto::{Account, User};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchown, fstat, mkdir, open},
    io::{Errno, read},
};

/// The name of an image's default user.
const USUAL: &[u8] = b"user";
/// Bytes that are read of either file.
const MOST_BYTES: usize = 256 * 1024;
/// Most supplementary groups of a user.
const MOST_GROUPS: usize = 64;
/// The directory below which missing homes are created.
const HOMES: &[u8] = b"/home/";

/// A user's credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Person {
    pub(crate) ids: User,
    /// The entry in `/etc/passwd`, if the user was given by name.
    pub(crate) entry: Option<Entry>,
}

/// A user's name and home directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) home: Vec<u8>,
}

/// No user has that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unknown;

/// Returns the user of an account; `None`: the agent's own user.
pub(crate) fn person(account: Option<&Account>) -> Result<Option<Person>, Unknown> {
    let (name, needed) = match account {
        None => return Ok(None),
        Some(Account::Ids(ids)) => {
            return Ok(Some(Person {
                ids: ids.clone(),
                entry: None,
            }));
        }
        Some(Account::Usual) => (USUAL, false),
        Some(Account::Name(name)) => (name.as_slice(), true),
    };
    match look_up(name, &content(c"/etc/passwd"), || content(c"/etc/group")) {
        None if needed => Err(Unknown),
        person => Ok(person),
    }
}

/// Returns the owner for an account; `None`: the owner is left as it is.
pub(crate) fn owner(account: Option<&Account>) -> Result<Option<(Uid, Gid)>, Unknown> {
    let person = person(account)?;
    Ok(person.map(|person| (Uid::from_raw(person.ids.uid), Gid::from_raw(person.ids.gid))))
}

/// Looks up a name. Root exists in any case.
fn look_up(name: &[u8], passwd: &[u8], group: impl FnOnce() -> Vec<u8>) -> Option<Person> {
    let mut lines = passwd.split(|&byte| byte == b'\n');
    let found = lines.find_map(|line| {
        let [known, _, uid, gid, _, home] = fields(line)?;
        let ids = (number(uid)?, number(gid)?);
        (known == name && !name.is_empty()).then(|| (ids, home.to_owned()))
    });
    let ((uid, gid), home) = match found {
        None if name == b"root" => ((0, 0), b"/root".to_vec()),
        found => found?,
    };
    let home = match home.as_slice() {
        b"" => b"/".to_vec(),
        _ => home,
    };
    let mut groups = groups_of(name, &group());
    groups.retain(|&group| group != gid);
    Some(Person {
        ids: User { uid, gid, groups },
        entry: Some(Entry {
            name: name.to_owned(),
            home,
        }),
    })
}

fn groups_of(name: &[u8], group: &[u8]) -> Vec<u32> {
    group
        .split(|&byte| byte == b'\n')
        .filter_map(|line| {
            let [_, _, gid, members] = fields(line)?;
            let mut members = members.split(|&byte| byte == b',');
            members.any(|member| member == name).then_some(number(gid)?)
        })
        .take(MOST_GROUPS)
        .collect()
}

/// Returns the first fields of a line; `None` if it has fewer.
fn fields<const N: usize>(line: &[u8]) -> Option<[&[u8]; N]> {
    let mut all = line.split(|&byte| byte == b':');
    let mut fields = [&b""[..]; N];
    for field in &mut fields {
        *field = all.next()?;
    }
    Some(fields)
}

fn number(field: &[u8]) -> Option<u32> {
    core::str::from_utf8(field).ok()?.parse().ok()
}

/// Returns the beginning of a file; empty if it cannot be read.
fn content(path: &core::ffi::CStr) -> Vec<u8> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = open(path, flags, Mode::empty()) else {
        return Vec::new();
    };
    let (mut content, mut chunk) = (Vec::new(), vec![0; 4096]);
    while content.len() < MOST_BYTES
        && let Ok(count @ 1..) = read(&file, &mut *chunk)
    {
        content.extend_from_slice(chunk.get(..count).unwrap_or_default());
    }
    content
}

impl Entry {
    /// Creates the home directory if it is missing, and gives it to the user if it is root's, as
    /// all files of an image are. Only homes right below `/home` are touched: those of system users
    /// (`/usr/sbin`, say) must not become theirs.
    pub(crate) fn settle_home(&self, ids: &User) -> Result<(), Errno> {
        let name = self.home.strip_prefix(HOMES).unwrap_or_default();
        if ids.uid == 0 || matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Ok(());
        }
        for place in [HOMES, &self.home] {
            match mkdir(place, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let home = open(self.home.as_slice(), flags, Mode::empty())?;
        if fstat(&home)?.st_uid == 0 {
            fchown(
                &home,
                Some(Uid::from_raw(ids.uid)),
                Some(Gid::from_raw(ids.gid)),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const PASSWD: &[u8] =
        b"root:x:0:0:root:/root:/bin/sh\nbad\nuser:x:1000:1001:,,,:/home/user:/bin/sh\n\
        huge:x:99999999999:1:::\nbare:x:7:8::\n";
    const GROUP: &[u8] =
        b"root:x:0:\naudio:x:29:user,other\nuser:x:1001:user\nbad:x:user\nvideo:x:44:other,user\n";

    fn find(name: &str) -> Option<Person> {
        look_up(name.as_bytes(), PASSWD, || GROUP.to_vec())
    }

    #[test]
    fn names_lead_to_ids_groups_and_home() {
        let user = find("user").unwrap();
        assert_eq!((user.ids.uid, user.ids.gid), (1000, 1001));
        assert_eq!(user.ids.groups, [29, 44]);
        assert_eq!(user.entry.unwrap().home, b"/home/user");
        assert_eq!(find("root").unwrap().entry.unwrap().home, b"/root");
        assert_eq!(find("bare").unwrap().entry.unwrap().home, b"/");
        for name in ["", "bad", "huge", "x", "use", "user:x"] {
            assert_eq!(find(name), None, "{name}");
        }
        // Without any files, root exists.
        let root = look_up(b"root", b"", Vec::new).unwrap();
        assert_eq!((root.ids.uid, root.ids.gid), (0, 0));
        assert_eq!(look_up(b"user", b"", Vec::new), None);
    }
}
