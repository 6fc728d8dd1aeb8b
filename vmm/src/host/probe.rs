//! The probe guest: measures how fast this host runs 64-bit ring 0.
//!
//! Ten thousand iterations of `dec; jnz` take microseconds on hardware and about 8 ms where KVM
//! emulates ring 0. CPU names and flags do not show the difference, so it is measured.

use std::time::{Duration, Instant};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use super::{CpuProfile, HostError, ioctl};
use crate::boot::long_mode;
use crate::kvm::{create_vcpu, create_vm, run_patiently, set_memory};
use crate::layout;
use crate::memory::{GuestRam, MIB};

/// Ring 0 is emulated if 10,000 iterations take this long or longer: ten times the need of a slow
/// nested host, a quarter of the emulator's.
const THRESHOLD: Duration = Duration::from_millis(2);

/// `mov ecx, 10000; l: dec ecx; jnz l; hlt; jmp start`: one round ends at each `hlt`.
const CODE: [u8; 12] = [
    0xb9, 0x10, 0x27, 0x00, 0x00, // mov ecx, 10000
    0xff, 0xc9, // dec ecx
    0x75, 0xfc, // jnz -4
    0xf4, // hlt
    0xeb, 0xf4, // jmp -12
];

/// Time of a round on a fast host, entry and exit of the guest included: several times the need of
/// today's processors.
const FAST: Duration = Duration::from_micros(50);
/// Maximum factor for the timeouts of a slow host.
pub(super) const MOST_PATIENT: u32 = 10;

/// Maximum number of rounds that are measured.
const ROUNDS: u32 = 3;
/// Maximum number of interruptions: a signal of the embedding program every millisecond, for ten
/// seconds.
const INTERRUPTIONS: u32 = 10_000;

/// An uninterrupted part of a round.
enum Part {
    /// A signal ended it; the round goes on.
    Interrupted,
    /// The round is complete.
    Last,
}

/// The probe's result: the best round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Probe {
    pub(crate) best: Duration,
}

impl Probe {
    /// Runs the probe guest with the host's CPUID on the calling thread, for at most three rounds,
    /// fewer when one is fast.
    pub(crate) fn run(kvm: &Kvm, cpuid: &CpuId) -> Result<Probe, HostError> {
        let failed = |what: &dyn std::fmt::Display| HostError::Probe(what.to_string());
        let ram = GuestRam::new(2 * MIB).map_err(|e| failed(&e))?;
        ram.map()
            .write_slice(&CODE, GuestAddress(layout::HIGH_START))
            .map_err(|e| failed(&e))?;
        let vm = create_vm(kvm)?;
        set_memory(&vm, &ram)?;
        let mut vcpu = create_vcpu(&vm, 0, cpuid)?;
        let mut sregs = vcpu.get_sregs().map_err(|e| ioctl("KVM_GET_SREGS", e))?;
        long_mode::enter(ram.map(), &mut sregs).map_err(|e| failed(&e))?;
        vcpu.set_sregs(&sregs)
            .map_err(|e| ioctl("KVM_SET_SREGS", e))?;
        let regs = kvm_bindings::kvm_regs {
            rip: layout::HIGH_START,
            rflags: 2,
            rsp: layout::BOOT_STACK,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(|e| ioctl("KVM_SET_REGS", e))?;
        Self::measure(|| {
            let start = Instant::now();
            let exit = run_patiently(|| match vcpu.run()? {
                VcpuExit::Hlt => Ok(None),
                other => Ok(Some(format!("exit {other:?}"))),
            });
            let part = match exit {
                Ok(None) => Part::Last,
                Ok(Some(other)) => return Err(HostError::Probe(other)),
                Err(e) => match e.errno() {
                    libc::EINTR => Part::Interrupted,
                    libc::EAGAIN => return Err(HostError::Thread(std::io::Error::from(e))),
                    _ => return Err(ioctl("KVM_RUN", e)),
                },
            };
            Ok((part, start.elapsed()))
        })
    }

    /// Returns the best of a few rounds. A signal interrupts a round, and the guest continues where
    /// it was: a round takes as long as its parts together.
    fn measure(
        mut run: impl FnMut() -> Result<(Part, Duration), HostError>,
    ) -> Result<Probe, HostError> {
        let mut best = Duration::MAX;
        let mut interruptions = 0;
        for _ in 0..ROUNDS {
            let mut round = Duration::ZERO;
            loop {
                let (part, took) = run()?;
                round += took;
                match part {
                    Part::Last => break,
                    Part::Interrupted => interruptions += 1,
                }
                if interruptions > INTERRUPTIONS {
                    let cause = "signals kept interrupting it; try again";
                    return Err(HostError::Probe(cause.into()));
                }
            }
            best = best.min(round);
            if best < THRESHOLD {
                break;
            }
        }
        Ok(Probe { best })
    }

    /// Returns how many times slower than a fast host this one is, rounded up: 1 to
    /// [`MOST_PATIENT`].
    pub(super) fn timeout_factor(self) -> u32 {
        let times = self.best.as_nanos().div_ceil(FAST.as_nanos());
        u32::try_from(times)
            .unwrap_or(u32::MAX)
            .clamp(1, MOST_PATIENT)
    }

    pub(crate) fn profile(self) -> CpuProfile {
        if self.best < THRESHOLD {
            CpuProfile::Native
        } else {
            CpuProfile::Emulated
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_tells_hardware_from_the_emulator() {
        assert_eq!(
            Probe {
                best: Duration::from_micros(150)
            }
            .profile(),
            CpuProfile::Native
        );
        assert_eq!(
            Probe {
                best: Duration::from_millis(8)
            }
            .profile(),
            CpuProfile::Emulated
        );
    }

    #[test]
    fn a_slow_host_is_given_more_time_and_an_emulated_one_most() {
        let factor = |micros| {
            let best = Duration::from_micros(micros);
            Probe { best }.timeout_factor()
        };
        assert_eq!(
            [0, 5, 50, 51, 150, 450, 2_000].map(factor),
            [1, 1, 1, 2, 3, 9, 10]
        );
        assert_eq!(factor(8_000), 10);
    }

    const MS: Duration = Duration::from_millis(1);

    /// Returns the measured time when the guest's runs are `parts`, in this order.
    fn measured(parts: impl IntoIterator<Item = (Part, Duration)>) -> Result<Duration, HostError> {
        let mut parts = parts.into_iter();
        Probe::measure(|| Ok(parts.next().unwrap())).map(|probe| probe.best)
    }

    #[test]
    fn interruptions_make_a_host_neither_slow_nor_fast() {
        let interrupted = || (Part::Interrupted, MS / 10);
        let fast = [
            interrupted(),
            interrupted(),
            interrupted(),
            (Part::Last, MS / 10),
        ];
        assert_eq!(measured(fast).unwrap(), 4 * MS / 10);
        // Each round's last part alone is as short as a round on hardware.
        let slow = (0..3).flat_map(|_| {
            let cut = (0..7).map(|_| (Part::Interrupted, MS));
            cut.chain([(Part::Last, MS / 10)])
        });
        assert_eq!(measured(slow).unwrap(), 7 * MS + MS / 10);
        let endless = std::iter::repeat_with(interrupted);
        assert!(matches!(measured(endless), Err(HostError::Probe(_))));
    }
}
