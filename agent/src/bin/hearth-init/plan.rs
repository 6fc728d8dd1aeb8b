//! Checks a request and prepares the child's input: strings, the environment, the paths to try.

use alloc::{borrow::ToOwned, collections::BTreeMap, ffi::CString, string::String, vec, vec::Vec};
use core::ffi::CStr;

use hearth_agent::proto::{Exec, SpawnFailure};
use rustix::{fs::FileType, process::Resource};

use crate::{account::Person, applets};

const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most directories of PATH that are searched.
const MAX_PATH_ENTRIES: usize = 64;

/// A checked command.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    pub(crate) limits: Vec<(Resource, u64)>,
    pub(crate) user: Option<Ids>,
    /// Whether it is kept from gaining privileges (prctl(2), PR_SET_NO_NEW_PRIVS).
    pub(crate) no_new_privs: bool,
}

/// User, group and supplementary groups.
pub(crate) type Ids = (
    rustix::process::Uid,
    rustix::process::Gid,
    Vec<rustix::process::Gid>,
);

impl Plan {
    /// Checks a request.
    ///
    /// # Errors
    /// [`SpawnFailure::BadArgument`], which names the invalid part.
    pub(crate) fn new(exec: &Exec, person: Option<&Person>) -> Result<Self, SpawnFailure> {
        let argv = exec
            .argv
            .iter()
            .map(|arg| text(arg, "argument"))
            .collect::<Result<Vec<_>, _>>()?;
        let program = argv.first().ok_or_else(|| bad("no program given"))?;
        let entry = person.and_then(|person| person.entry.as_ref());
        let home: &[u8] = match (entry, person) {
            (Some(entry), _) => &entry.home,
            (None, Some(person)) if person.ids.uid != 0 => b"/",
            _ => b"/root",
        };
        let mut env = BTreeMap::new();
        if !exec.clear_env {
            env.insert(&b"PATH"[..], DEFAULT_PATH);
            env.insert(&b"HOME"[..], home);
            for name in [&b"USER"[..], b"LOGNAME"] {
                env.extend(entry.map(|entry| (name, entry.name.as_slice())));
            }
        }
        if exec.terminal.is_some() && !exec.clear_env {
            env.insert(&b"TERM"[..], b"xterm");
        }
        for (key, value) in &exec.env {
            if key.is_empty() || key.contains(&b'=') {
                return Err(bad(
                    "environment variable with an empty name or a '=' in it",
                ));
            }
            env.insert(key, value);
        }
        let candidates = candidates(
            program,
            env.get(&b"PATH"[..]).copied().unwrap_or(DEFAULT_PATH),
        )?;
        let env = env
            .iter()
            .map(|(key, value)| text(&[key, &b"="[..], value].concat(), "environment variable"))
            .collect::<Result<Vec<_>, _>>()?;
        let cwd = text(
            match (&exec.cwd, entry) {
                (Some(cwd), _) => cwd.as_slice(),
                // The home directories of some users do not exist.
                (None, Some(entry)) if is_dir(&entry.home) => &entry.home,
                (None, _) => b"/",
            },
            "working directory",
        )?;
        let limits = [
            (Resource::Nofile, exec.limits.open_files.map(u64::from)),
            (Resource::Fsize, exec.limits.file_bytes),
        ];
        let limits = limits
            .into_iter()
            .filter_map(|(resource, value)| Some((resource, value?)))
            .collect();
        let user = person.map(|person| ids(&person.ids)).transpose()?;
        let is_root = user.as_ref().is_none_or(|(uid, ..)| uid.is_root());
        Ok(Self {
            candidates,
            argv,
            env,
            cwd,
            limits,
            user,
            no_new_privs: !is_root && !exec.new_privileges,
        })
    }

    /// Returns the program as it was requested, for messages.
    pub(crate) fn program(&self) -> String {
        self.argv
            .first()
            .map(|program| lossy(program))
            .unwrap_or_default()
    }
}

/// Returns the paths to try for `program`, as `execvp` does; then the agent itself, if the name is
/// that of an applet.
fn candidates(program: &CStr, path: &[u8]) -> Result<Vec<CString>, SpawnFailure> {
    let name = program.to_bytes();
    if name.is_empty() {
        return Err(bad("empty program name"));
    }
    if name.contains(&b'/') {
        return Ok(vec![program.to_owned()]);
    }
    let mut found = path
        .split(|&byte| byte == b':')
        .take(MAX_PATH_ENTRIES)
        .map(|dir| if dir.is_empty() { &b"."[..] } else { dir })
        .map(|dir| text(&[dir, &b"/"[..], name].concat(), "PATH"))
        .collect::<Result<Vec<_>, _>>()?;
    if applets::has(name) {
        found.push(c"/proc/self/exe".to_owned());
    }
    Ok(found)
}

fn is_dir(path: &[u8]) -> bool {
    let found = rustix::fs::stat(path);
    found.is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory)
}

pub(crate) fn ids(user: &hearth_agent::proto::User) -> Result<Ids, SpawnFailure> {
    use rustix::process::{Gid, Uid};
    // To the system calls, all ones means "leave unchanged".
    let ids = [user.uid, user.gid];
    if ids.iter().chain(&user.groups).any(|&id| id == u32::MAX) {
        return Err(bad("user or group id 4294967295"));
    }
    Ok((
        Uid::from_raw(user.uid),
        Gid::from_raw(user.gid),
        user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect(),
    ))
}

fn text(bytes: &[u8], what: &str) -> Result<CString, SpawnFailure> {
    CString::new(bytes).map_err(|_| bad(&["NUL byte in ", what].concat()))
}

pub(crate) fn bad(reason: &str) -> SpawnFailure {
    SpawnFailure::BadArgument(reason.to_owned())
}

/// Converts a string to text for a message.
pub(crate) fn lossy(text: &CStr) -> String {
    text.to_string_lossy().into_owned()
}
