//! Limits of the host and of this process. Each must leave room for one guest, and bounds how many
//! run at once.

use std::fs;

use hearth_pool::{Host as _, ThisHost, memory_limit, thread_limit};
use hearth_vmm::{DEFAULT_MEMORY_MIB, MIN_MEMORY_MIB};
use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

use super::Check;

/// Room for fewer guests than this draws a warning.
const MODEST_GUESTS: u64 = 100;
/// `hearth run` works with 20 descriptors and not with 19.
const DESCRIPTORS: Need = Need {
    first: 20,
    further: 16,
};
/// `hearth run` works with twelve threads beside its first. Each further guest has one thread for
/// each vCPU and a helper thread of KVM's.
const THREADS: Need = Need {
    first: 14,
    further: 2,
};
/// Address space in MiB: a guest's memory, and the 64 MiB that glibc reserves for each thread that
/// allocates.
const ADDRESS_SPACE: Need = Need {
    first: MIN_MEMORY_MIB + 14 * 64,
    further: DEFAULT_MEMORY_MIB + 8,
};
/// A file size limit below this many MiB draws a warning: it only allows small guests, and images
/// need more.
const MODEST_FILE_MIB: u64 = 4096;

/// What a process needs of a limited resource: for its first guest, and for each further one.
#[derive(Debug, Clone, Copy)]
struct Need {
    first: u64,
    further: u64,
}

impl Need {
    /// Returns how many guests `left` is enough for.
    fn guests(self, left: u64) -> u64 {
        match left.checked_sub(self.first) {
            None => 0,
            Some(rest) => 1 + rest / self.further,
        }
    }

    /// Judges `left`; `found` describes it.
    fn check(self, name: &'static str, found: String, left: u64, advice: &str) -> Check {
        match self.guests(left) {
            0 => Check::fail(
                name,
                format!(
                    "{found}: too little for one guest, which needs {}",
                    self.first
                ),
                advice,
            ),
            few @ ..MODEST_GUESTS => Check::warn(
                name,
                found,
                format!("enough for about {few} guests; {advice}"),
            ),
            _ => Check::ok(name, found),
        }
    }
}

pub(super) fn checks() -> Vec<Check> {
    vec![
        proc(),
        descriptors(),
        threads(),
        signals(),
        file_size(),
        address_space(),
        memory(),
        overcommit(),
    ]
}

/// Most of the checks below read /proc.
fn proc() -> Check {
    match fs::metadata("/proc/self/status") {
        Ok(_) => Check::ok("proc", "/proc is mounted"),
        Err(_) => Check::warn(
            "proc",
            "/proc is not mounted: guests run, but limits and free memory are not known",
            "mount it with: mount -t proc proc /proc",
        ),
    }
}

fn descriptors() -> Check {
    let limit = getrlimit(Resource::Nofile);
    let soft = limit.current.unwrap_or(u64::MAX);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let advice = if DESCRIPTORS.guests(hard) > DESCRIPTORS.guests(soft) {
        format!("raise it with: ulimit -n {}", count(hard))
    } else {
        "the hard limit is no higher: raise it with LimitNOFILE= of the service or in \
         /etc/security/limits.conf"
            .to_owned()
    };
    let inherited = inherited(soft);
    let mut found = format!("{} descriptors (soft limit)", count(soft));
    if inherited > 0 {
        found = format!("{found}, {inherited} of them inherited open");
    }
    DESCRIPTORS.check("files", found, soft.saturating_sub(inherited), &advice)
}

/// Counts descriptors below `limit` that the parent process left open in this one, beside the three
/// standard ones: the next program would inherit them as well.
fn inherited(limit: u64) -> u64 {
    let is_inherited = |number: &u64| {
        let flags = field(&format!("/proc/self/fdinfo/{number}"), "flags:");
        let flags = flags.and_then(|flags| u64::from_str_radix(&flags, 8).ok());
        flags.is_some_and(|flags| flags & u64::from(OFlags::CLOEXEC.bits()) == 0)
    };
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten();
    let numbers = open.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let numbers = numbers.filter(|number| (3..limit).contains(number));
    numbers.filter(is_inherited).count() as u64
}

fn threads() -> Check {
    let Some(limit) = thread_limit() else {
        return Check::ok("threads", "no limit is known");
    };
    let advice = format!("each vCPU is a thread; raise {}", limit.name);
    let found = format!("{} more threads, by {}", limit.left, limit.name);
    THREADS.check("threads", found, limit.left, &advice)
}

/// For information only: vCPUs are kicked by a signal that needs no place in this queue.
fn signals() -> Check {
    let limit = getrlimit(Resource::Sigpending).current;
    let used = field("/proc/self/status", "SigQ:").and_then(|field| {
        let (used, _) = field.split_once('/')?;
        used.parse::<u64>().ok()
    });
    let used = used.map_or("an unknown number".to_owned(), |used| used.to_string());
    Check::ok(
        "signals",
        format!(
            "{used} of {} queued signals of this user; guests need none",
            count(limit.unwrap_or(u64::MAX))
        ),
    )
}

/// To the kernel, guest memory is a file, though not on a disk.
fn file_size() -> Check {
    let Some(bytes) = getrlimit(Resource::Fsize).current else {
        return Check::ok("file size", "unlimited");
    };
    let mib = bytes >> 20;
    let found = format!("files of up to {mib} MiB, guest memory among them");
    let advice = "raise it with: ulimit -f unlimited";
    if mib < MIN_MEMORY_MIB {
        Check::fail("file size", found, advice)
    } else if mib < MODEST_FILE_MIB {
        Check::warn(
            "file size",
            found,
            format!("larger guests are refused and larger images not built; {advice}"),
        )
    } else {
        Check::ok("file size", found)
    }
}

fn address_space() -> Check {
    let Some(bytes) = getrlimit(Resource::As).current else {
        return Check::ok("addresses", "unlimited");
    };
    let used = field("/proc/self/status", "VmSize:").and_then(|kib| kib.parse::<u64>().ok());
    let left = (bytes >> 20).saturating_sub(used.unwrap_or(0) >> 10);
    ADDRESS_SPACE.check(
        "addresses",
        format!("{left} MiB of address space left to this process"),
        left,
        "raise it with: ulimit -v unlimited",
    )
}

fn memory() -> Check {
    let Some(available) = ThisHost.memory_available_mib() else {
        return Check::warn("memory", "/proc/meminfo is not readable", "mount /proc");
    };
    let found = format!(
        "{available} MiB available, enough for {} guests of {DEFAULT_MEMORY_MIB} MiB",
        available / DEFAULT_MEMORY_MIB
    );
    let advice = match memory_limit() {
        Some(limit) => format!("end other programs, raise {}, or add memory", limit.name),
        None => "end other programs, or add memory".to_owned(),
    };
    if available < MIN_MEMORY_MIB {
        Check::fail("memory", found, advice)
    } else if available < DEFAULT_MEMORY_MIB {
        Check::warn(
            "memory",
            found,
            format!("{advice}, or give guests less with --memory"),
        )
    } else {
        Check::ok("memory", found)
    }
}

fn overcommit() -> Check {
    match number("/proc/sys/vm/overcommit_memory") {
        Some(2) => Check::warn(
            "overcommit",
            "strict: guest memory counts in full when it is made, not when it is used",
            "to run more guests: sudo sysctl vm.overcommit_memory=0",
        ),
        Some(mode) => Check::ok(
            "overcommit",
            format!("mode {mode}: guest memory counts when it is used"),
        ),
        None => Check::ok("overcommit", "not known"),
    }
}

/// The number that a file consists of.
fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The first word after `name` in a file of lines such as `VmSize:  100 kB`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next().map(str::to_owned)
}

fn count(limit: u64) -> String {
    if limit == u64::MAX {
        "unlimited".to_owned()
    } else {
        limit.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn what_is_too_little_for_one_guest_fails_and_for_a_hundred_warns() {
        let need = Need {
            first: 24,
            further: 16,
        };
        let verdict = |left| need.check("files", String::new(), left, "raise it").verdict;
        assert_eq!(verdict(0), Verdict::Fail);
        assert_eq!(verdict(23), Verdict::Fail);
        assert_eq!(verdict(24), Verdict::Warn);
        assert_eq!(verdict(24 + 98 * 16), Verdict::Warn);
        assert_eq!(verdict(24 + 99 * 16), Verdict::Ok);
        assert_eq!(verdict(u64::MAX), Verdict::Ok);
    }
}
