//! The guest's PID 1; see `init` for the boot order.
//!
//! On a host that emulates ring 0, each system call, page fault and context switch costs up to
//! milliseconds, and each KiB of this program costs a thousand instructions before it runs. So the
//! path to the first pong avoids them: one thread, no runtime, no library that the program does not
//! need, and nothing is mounted before the host has its answer.
//!
//! If not started by the kernel, this program is one of the [`applets`], or with `--serve-unix
//! PATH` the same server as an ordinary process, for tests without a VM.
#![no_std]
#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(dead_code, reason = "tests have a main of their own"))]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

#[cfg(all(freestanding, not(panic = "abort")))]
compile_error!("a static hearth-init needs panic = \"abort\": build it with --profile guest");

extern crate alloc;
#[cfg(not(freestanding))]
extern crate std;

mod account;
mod applets;
mod cgroup;
mod channel;
mod clock;
mod conn;
mod diagnose;
mod exec;
mod files;
#[cfg(freestanding)]
mod freestanding;
mod guest;
#[cfg(not(freestanding))]
mod hosted;
mod hygiene;
mod kept;
mod kill;
mod mounts;
mod plan;
mod quiet;
mod reaper;
mod rights;
mod root;
mod serve;
mod spawn;
mod sys;
mod terminal;
mod text;
mod transport;

use alloc::vec::Vec;

#[cfg(freestanding)]
use freestanding as runtime;
#[cfg(not(freestanding))]
use hosted as runtime;
use rustix::{
    process::getpid,
    system::{RebootCommand, reboot},
};

use crate::{cgroup::Cgroups, guest::Guest, reaper::Reaper, serve::Server, transport::Transport};

/// Runs the program and returns its exit code.
fn start() -> u8 {
    let started_us = clock::uptime_us();
    if getpid().is_init() {
        init(started_us)
    } else {
        ordinary(started_us, &runtime::args())
    }
}

/// Boots as PID 1, in order, and serves until the guest ends. Returns only if `reboot` fails.
fn init(started_us: u64) -> u8 {
    sys::occupy_standard_fds();
    let end = Reaper::start().map(|reaper| {
        let guest = Guest::booted(started_us, true, Cgroups::at_usual_place());
        let mut server = Server::new(guest, reaper, Transport::vsock());
        // Connect before listening: the host learns as early as possible that the guest is ready.
        server.dial();
        server.listen();
        server.run()
    });
    rustix::fs::sync();
    // The kernel panics if PID 1 exits, so the guest is ended here. Without a server it powers off.
    let _ = reboot(end.map_or(RebootCommand::PowerOff, serve::End::reboot_command));
    1
}

/// Runs as an ordinary process: a server on a Unix socket, or an applet.
fn ordinary(started_us: u64, args: &[Vec<u8>]) -> u8 {
    let words: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
    match words.get(1..).unwrap_or_default() {
        [b"--serve-unix", path] => serve_unix(started_us, path, Cgroups::none()),
        [b"--serve-unix", path, b"--cgroup", dir] => serve_unix(started_us, path, Cgroups::at(dir)),
        _ => applets::run(args),
    }
}

fn serve_unix(started_us: u64, path: &[u8], cgroups: Cgroups) -> u8 {
    sys::occupy_standard_fds();
    sys::close_inherited_on_exec();
    // Orphans are reparented to this process, as they are to PID 1.
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
