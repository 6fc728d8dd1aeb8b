//! Finds out why a program did not start, after the fact: the errno alone does not tell what is
//! missing.

use alloc::{string::String, vec::Vec};
use core::ffi::CStr;

use hearth_agent::proto::{self, SpawnFailure};
use rustix::{
    fs::{Mode, OFlags, open},
    io::{Errno, pread},
    process::Resource,
};

use crate::{
    plan::{Plan, bad, lossy},
    rights::Rights,
    spawn::{Refusal, Step},
};

/// Returns the failure that a refusal stands for.
pub(crate) fn failure((plan, refusal): &(Plan, Refusal)) -> SpawnFailure {
    let errno = refusal.errno.raw_os_error();
    match (refusal.step, refusal.errno) {
        (_, Errno::NOMEM) => SpawnFailure::Exhausted(proto::Resource::Memory),
        (_, Errno::MFILE | Errno::NFILE) => SpawnFailure::Exhausted(proto::Resource::OpenFiles),
        (Step::Clone | Step::Exec | Step::User, Errno::AGAIN) => {
            SpawnFailure::Exhausted(proto::Resource::Processes)
        }
        (Step::Cwd, _) => SpawnFailure::MissingCwd {
            cwd: lossy(&plan.cwd),
            errno,
        },
        (Step::User, _) => SpawnFailure::User { errno },
        (Step::Terminal, _) => SpawnFailure::NoTerminal { errno },
        (Step::Limit(Resource::Nofile), _) => SpawnFailure::Limit {
            limit: proto::Resource::OpenFiles,
            errno,
        },
        (Step::Limit(_), _) => SpawnFailure::Limit {
            limit: proto::Resource::FileSize,
            errno,
        },
        (Step::Exec, Errno::TOOBIG) => {
            bad("arguments and environment are longer than the guest's kernel takes")
        }
        (Step::Exec, Errno::NOENT | Errno::NOTDIR) => missing(plan),
        (
            Step::Exec,
            Errno::ACCESS | Errno::PERM | Errno::NOEXEC | Errno::TXTBSY | Errno::ISDIR,
        ) => SpawnFailure::NotExecutable {
            program: plan.program(),
            errno,
        },
        _ => SpawnFailure::Other { errno },
    }
}

/// Tells a missing program from one whose interpreter is missing, as the kernel returns ENOENT for
/// both. The file is opened with the rights that it was to be executed with.
fn missing(plan: &Plan) -> SpawnFailure {
    let program = plan.program();
    let rights = Rights::of(plan.user.clone());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened = rights.with(|| {
        let places = plan.candidates.iter();
        let mut places = places.map(|candidate| absolute(&plan.cwd, candidate));
        places.find_map(|place| open(place.as_slice(), flags, Mode::empty()).ok())
    });
    let Ok(Some(file)) = opened else {
        return SpawnFailure::NotFound { program };
    };
    let interpreter = interpreter(|buffer, at| pread(&file, buffer, at).unwrap_or(0));
    SpawnFailure::MissingInterpreter {
        program,
        interpreter: interpreter.unwrap_or_default(),
    }
}

fn absolute(cwd: &CStr, path: &CStr) -> Vec<u8> {
    let path = path.to_bytes();
    if path.starts_with(b"/") {
        path.to_vec()
    } else {
        [cwd.to_bytes(), path].join(&b'/')
    }
}

/// Returns the interpreter that a script or a 64-bit ELF file names.
fn interpreter(read: impl Fn(&mut [u8], u64) -> usize) -> Option<String> {
    const LONGEST: usize = 256;
    const PT_INTERP: [u8; 4] = 3_u32.to_le_bytes();
    let mut head = [0; LONGEST];
    let head = head.get_mut(..)?;
    let count = read(head, 0);
    let head = head.get(..count)?;
    let named = |bytes: &[u8]| {
        let word = bytes
            .split(|&byte| matches!(byte, b'\n' | b' ' | b'\t' | 0))
            .find(|word| !word.is_empty())?;
        Some(String::from_utf8_lossy(word).into_owned())
    };
    if let Some(line) = head.strip_prefix(b"#!") {
        return named(line);
    }
    if !head.starts_with(b"\x7fELF\x02") {
        return None;
    }
    let number =
        |bytes: &[u8], at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let headers_at = number(head, 32)?;
    let header_count = u16::from_le_bytes(*head.get(56..)?.first_chunk()?).min(64);
    for index in 0..u64::from(header_count) {
        let mut header = [0; 56];
        if read(&mut header, headers_at.checked_add(index * 56)?) < header.len()
            || !header.starts_with(&PT_INTERP)
        {
            continue;
        }
        let mut path = [0; LONGEST];
        let count = read(&mut path, number(&header, 8)?);
        return named(path.get(..count)?);
    }
    None
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "tests")]
mod tests {
    use super::*;

    fn of(file: &[u8]) -> Option<String> {
        interpreter(|buffer, at| {
            let from = usize::try_from(at).map_or(&[][..], |at| file.get(at..).unwrap_or_default());
            let count = from.len().min(buffer.len());
            buffer[..count].copy_from_slice(&from[..count]);
            count
        })
    }

    #[test]
    fn scripts_and_programs_name_their_interpreters() {
        assert_eq!(of(b"#!/bin/nope -x\nrest").as_deref(), Some("/bin/nope"));
        assert_eq!(
            of(b"#! /usr/bin/env python\n").as_deref(),
            Some("/usr/bin/env")
        );
        assert_eq!(of(b"#!"), None);
        assert_eq!(of(b"plain"), None);
        let sh = std::fs::read("/bin/sh").unwrap();
        assert!(of(&sh).unwrap().contains("ld-linux"), "{:?}", of(&sh));
        for end in 0..200 {
            of(&sh[..end]);
        }
    }
}
