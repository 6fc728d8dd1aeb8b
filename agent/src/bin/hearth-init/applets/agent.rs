//! Programs that make the agent fail, as a bug of its own would, or try to. They need root, as they
//! use ptrace and real-time priorities.

use alloc::vec::Vec;
use core::time::Duration;

use rustix::io::Errno;

use super::Failure;
use crate::{clock, sys, text::say};

// include/uapi/linux/ptrace.h
const PTRACE_POKEUSER: usize = 6;
const PTRACE_DETACH: usize = 17;
const PTRACE_SEIZE: usize = 0x4206;
const PTRACE_INTERRUPT: usize = 0x4207;
/// Offset of the instruction pointer in `struct user` (arch/x86/include/asm/user_64.h).
const RIP: usize = 16 * 8;
/// An address in the first page, where nothing is ever mapped.
const NOWHERE: usize = 0x800;
const AGENT: usize = 1;
const LONG: Duration = Duration::from_secs(3600);

/// Stops the agent for as long as this program runs: the agent answers nothing, and the guest
/// lives.
pub(super) fn wedge(_: &[Vec<u8>]) -> Result<u8, Failure> {
    stop()?;
    loop {
        clock::sleep(LONG);
    }
}

/// Crashes the agent and, as it is PID 1, the guest.
pub(super) fn crash(_: &[Vec<u8>]) -> Result<u8, Failure> {
    stop()?;
    trace(PTRACE_POKEUSER, RIP, NOWHERE)?;
    // The agent's fatal signal must not be reported to this tracer first.
    trace(PTRACE_DETACH, 0, 0)?;
    loop {
        clock::sleep(LONG);
    }
}

/// Prints `starving`, then never gives up the processor to a process without real-time priority,
/// such as the agent.
pub(super) fn starve(_: &[Vec<u8>]) -> Result<u8, Failure> {
    say("starving")?;
    let parameters = libc::sched_param { sched_priority: 1 };
    let fifo = libc::SCHED_FIFO.unsigned_abs() as usize;
    let args = [0, fifo, (&raw const parameters).addr(), 0];
    // SAFETY: a pointer to a live structure that the kernel reads.
    unsafe { sys::call(libc::SYS_sched_setscheduler, args)? };
    loop {
        core::hint::spin_loop();
    }
}

fn stop() -> Result<(), Errno> {
    trace(PTRACE_SEIZE, 0, 0)?;
    trace(PTRACE_INTERRUPT, 0, 0)?;
    // The stop is reported to the tracer, even if it is not the parent.
    sys::wait_for(AGENT)
}

fn trace(request: usize, address: usize, data: usize) -> Result<(), Errno> {
    // SAFETY: none of the requests used here has the kernel read or write memory of this process.
    unsafe { sys::call(libc::SYS_ptrace, [request, AGENT, address, data]).map(drop) }
}
