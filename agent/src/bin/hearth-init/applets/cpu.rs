//! A program that computes on a given processor, to test that the processor works.

use alloc::{format, vec::Vec};

use rustix::{
    io::read,
    thread::{CpuSet, sched_getcpu, sched_setaffinity},
};

use super::{Failure, number};
use crate::{sys::stdin, text::say};

/// `work-on CPU ROUNDS`: binds itself to a processor, prints the number of the one that it runs on,
/// waits for a byte on stdin, computes without a system call, and prints the number of the
/// processor it ended on and the result: FNV-1a of ROUNDS bytes, each the processor's number.
pub(super) fn work_on(args: &[Vec<u8>]) -> Result<u8, Failure> {
    let cpu: u8 = number(args, 0)?;
    let rounds: u64 = number(args, 1)?;
    let mut only = CpuSet::new();
    only.set(cpu.into());
    sched_setaffinity(None, &only)?;
    say(format!("{}", sched_getcpu()).as_bytes())?;
    read(stdin(), &mut [0])?;
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for _ in 0..rounds {
        sum = (sum ^ u64::from(cpu)).wrapping_mul(0x100_0000_01b3);
    }
    say(format!("{} {sum:016x}", sched_getcpu()).as_bytes())?;
    Ok(0)
}
