//! The guest's PID 1, in boot order.
//!
//! On hosts that emulate ring 0 each system call, page fault and context switch costs up to milliseconds, so the way to the
//! first pong has as few of them as possible: one thread, no runtime, nothing mounted before the host has its answer.
//!
//! Started by anybody else than the kernel it is one of the [`applets`], or with `--serve-unix PATH` the same server as an
//! ordinary process, for tests without a VM.
#![cfg_attr(not(test), no_main)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

mod applets;
mod cgroup;
mod channel;
mod conn;
mod diagnose;
mod exec;
mod guest;
mod hygiene;
mod kill;
mod mounts;
mod plan;
mod reaper;
mod serve;
mod spawn;
mod sys;
mod transport;

use std::{ffi::OsString, path::PathBuf};

use rustix::{
    process::getpid,
    system::{RebootCommand, reboot},
};

use crate::{guest::Guest, reaper::Reaper, serve::Server, transport::Transport};

/// The C entry point: the standard library's own set-up (signal stacks, handlers) is left out, nothing here needs it.
// SAFETY: the only definition of `main`, with C's signature; the arguments are read through std::env.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    let started_us = guest::uptime_us();
    if getpid().is_init() {
        init(started_us)
    } else {
        i32::from(ordinary(started_us))
    }
}

/// The boot order. Never returns but by ending the guest.
fn init(started_us: u64) -> i32 {
    sys::occupy_standard_fds();
    let end = Reaper::start().map(|reaper| {
        let guest = Guest::booted(started_us, true, cgroup::Cgroups::at_usual_place());
        let mut server = Server::new(guest, reaper, Transport::vsock());
        // Dial first: the host learns as early as possible that the guest is ready.
        server.dial();
        server.listen();
        server.run()
    });
    rustix::fs::sync();
    // Returning would panic the kernel; so does staying when nothing serves, only later.
    let _ = reboot(end.map_or(RebootCommand::PowerOff, serve::End::reboot_command));
    1
}

/// What the binary is for everybody but the kernel.
fn ordinary(started_us: u64) -> u8 {
    let args: Vec<OsString> = std::env::args_os().collect();
    let mut rest = args.iter().skip(1);
    match (rest.next().and_then(|arg| arg.to_str()), rest.next()) {
        (Some("--serve-unix"), Some(path)) => {
            let cgroups = match (rest.next().and_then(|arg| arg.to_str()), rest.next()) {
                (Some("--cgroup"), Some(dir)) => cgroup::Cgroups::at(PathBuf::from(dir)),
                _ => cgroup::Cgroups::none(),
            };
            serve_unix(started_us, PathBuf::from(path), cgroups)
        }
        _ => applets::run(&args),
    }
}

fn serve_unix(started_us: u64, path: PathBuf, cgroups: cgroup::Cgroups) -> u8 {
    sys::occupy_standard_fds();
    sys::close_inherited_on_exec();
    // Orphans come here, as they do to PID 1.
    let _ = rustix::process::set_child_subreaper(Some(getpid()));
    let Ok(reaper) = Reaper::start() else {
        return 1;
    };
    let mut server = Server::new(
        Guest::booted(started_us, false, cgroups),
        reaper,
        Transport::unix(path),
    );
    server.listen();
    server.run();
    0
}
