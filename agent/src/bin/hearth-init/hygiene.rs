//! Makes a clone unique after restore: random state, time and names.

use alloc::{format, string::String};
use core::time::Duration;

use hearth_agent::proto::{
    Applied, InstanceId, MAX_ENTROPY, MAX_HOSTNAME, MIN_ENTROPY, Refresh, Refreshed, WallClock,
};
use rustix::{
    io::Errno,
    mount::mount_bind,
    rand::{GetRandomFlags, getrandom},
    system::sethostname,
    time::{ClockId, Timespec, clock_settime},
};

use crate::{kept::Kept, sys};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Bind-mounted over the kernel's boot id, where that cannot be written.
const BOOT_ID_COVER: &str = "/run/boot_id";
/// Steps the wall clock to the hypervisor's; a file of Hearth's kernels.
const STEP_CLOCK: &str = "/proc/sys/kernel/step_wall_clock";
/// A message whose time is off by more is not just late: its sender wants another time than the
/// hypervisor's.
const FROM_THE_HOST: Duration = Duration::from_secs(60);
/// Two readings of one host's clock may differ by this much.
const SLACK_NS: i128 = 20_000_000;
/// The time that the delivery of the host's message may have taken.
const A_DELIVERY: Duration = Duration::from_secs(2);
/// Adds fresh bytes to the random generator's key, and sets a new boot id with them; a file of
/// Hearth's kernels.
const REKEY: &str = "/proc/sys/kernel/random/rekey";
/// Bytes of a rekey that are for the generator; a boot id may follow.
const REKEY_BYTES: usize = 64;
/// Bytes of a boot id.
const UUID_BYTES: usize = 16;
const MACHINE_ID: &str = "/etc/machine-id";

/// The cached files that are rewritten in a clone.
#[derive(Debug)]
pub(crate) struct Hygiene {
    rekey: Kept,
    step_clock: Kept,
    machine_id: Kept,
    boot_id: Kept,
    boot_id_cover: Kept,
}

/// Draws random bytes for an id. Never waits for entropy: a guest that has none yet must boot all
/// the same, and its host gives it another id before it matters.
fn draw() -> [u8; 16] {
    let mut bytes = [0; 16];
    if getrandom(&mut bytes, GetRandomFlags::INSECURE).is_err() {
        bytes = u128::from(crate::clock::uptime_us()).to_ne_bytes();
    }
    bytes
}

/// Draws an instance id for a guest that has just booted.
pub(crate) fn draw_instance() -> InstanceId {
    InstanceId(draw())
}

/// Whether a request's sizes are in range.
pub(crate) fn in_range(refresh: &Refresh) -> bool {
    let entropy = refresh.entropy.len();
    let name = refresh.hostname.as_ref().map_or(1, String::len);
    (entropy == 0 || (MIN_ENTROPY..=MAX_ENTROPY).contains(&entropy))
        && (1..=MAX_HOSTNAME).contains(&name)
}

impl Hygiene {
    pub(crate) const fn new() -> Self {
        Self {
            rekey: Kept::of_kernel(REKEY),
            step_clock: Kept::of_kernel(STEP_CLOCK),
            machine_id: Kept::plain(MACHINE_ID),
            boot_id: Kept::of_kernel(BOOT_ID),
            boot_id_cover: Kept::plain(BOOT_ID_COVER),
        }
    }

    /// Applies each requested part by itself. An ordinary process (not PID 1) does not change the
    /// system that it runs on.
    pub(crate) fn refresh(&mut self, refresh: &Refresh, init: bool) -> Refreshed {
        let part = |asked: bool, run: &mut dyn FnMut() -> Result<(), Errno>| match (asked, init) {
            (false, _) => Applied::NotAsked,
            (true, false) => Applied::Failed {
                errno: Errno::PERM.raw_os_error(),
            },
            (true, true) => match run() {
                Ok(()) => Applied::Done,
                Err(errno) => Applied::Failed {
                    errno: errno.raw_os_error(),
                },
            },
        };
        // The host sends the boot id with the entropy: drawing it here would cost more.
        let entropy = refresh.entropy.as_slice();
        let (seed, id) = match entropy.split_last_chunk::<UUID_BYTES>() {
            Some((seed, id)) if seed.len() >= REKEY_BYTES => (seed, Some(*id)),
            _ => (entropy, None),
        };
        let named =
            init && id.is_some() && refresh.instance.is_some() && self.rekey.put(entropy).is_ok();
        // Entropy comes first: later parts may be drawn from it.
        Refreshed {
            entropy: part(!entropy.is_empty(), &mut || match named {
                true => Ok(()),
                false => self.reseed(seed),
            }),
            wall_clock: part(refresh.wall_clock.is_some(), &mut || {
                self.step_clock(refresh.wall_clock.unwrap_or_default())
            }),
            machine_id: part(refresh.instance.is_some(), &mut || {
                let id = format!("{}\n", refresh.instance.unwrap_or_default());
                self.machine_id.put(id.as_bytes())
            }),
            boot_id: part(refresh.instance.is_some(), &mut || match named {
                true => Ok(()),
                false => self.renew_boot_id(&uuid(id.unwrap_or_else(draw))),
            }),
            hostname: part(refresh.hostname.is_some(), &mut || {
                sethostname(refresh.hostname.as_deref().unwrap_or_default().as_bytes())
            }),
            programs: Applied::NotAsked,
        }
    }

    /// Hearth's kernels take a new key at once; others hash their pool for it.
    fn reseed(&mut self, seed: &[u8]) -> Result<(), Errno> {
        if seed.len() == REKEY_BYTES && self.rekey.put(seed).is_ok() {
            return Ok(());
        }
        sys::reseed(seed)
    }

    /// Sets the wall clock of a clone. The time that the host sent is late by the delivery of the
    /// message; Hearth's kernels take the time from the hypervisor at the moment of the step.
    fn step_clock(&mut self, sent: WallClock) -> Result<(), Errno> {
        if self.step_clock.put(b"1\n").is_ok() && is_plausible(lead(sent), FROM_THE_HOST) {
            return Ok(());
        }
        set_clock(sent)
    }

    /// Hearth's kernels take a new boot id; others keep theirs, and a file is bind-mounted over it.
    fn renew_boot_id(&mut self, id: &str) -> Result<(), Errno> {
        // Where the file is mounted over it already, this writes to that file.
        if self.boot_id.put(id.as_bytes()).is_ok() {
            return Ok(());
        }
        self.boot_id_cover.put(id.as_bytes())?;
        mount_bind(BOOT_ID_COVER, BOOT_ID)
    }
}

/// Sets the wall clock, unless it is ahead of the sent time by no more than a delivery may take:
/// setting it would then make a correct clock wrong, and turn it back under running programs.
pub(crate) fn correct_clock(sent: WallClock) -> Result<(), Errno> {
    if is_plausible(lead(sent), A_DELIVERY) {
        return Ok(());
    }
    set_clock(sent)
}

/// Returns by how many nanoseconds the wall clock is ahead of `sent`.
fn lead(sent: WallClock) -> i128 {
    let now = crate::clock::since_epoch().as_nanos();
    i128::try_from(now).unwrap_or_default() - i128::from(sent.since_epoch_ns)
}

/// Whether a clock that is ahead of a message by `lead` is correct, if the message took at most
/// `delivery`.
fn is_plausible(lead: i128, delivery: Duration) -> bool {
    let most = i128::try_from(delivery.as_nanos()).unwrap_or(i128::MAX);
    (-SLACK_NS..=most).contains(&lead)
}

fn set_clock(time: WallClock) -> Result<(), Errno> {
    let since_epoch = Duration::from_nanos(time.since_epoch_ns);
    let time = Timespec::try_from(since_epoch).map_err(|_| Errno::INVAL)?;
    clock_settime(ClockId::Realtime, time)
}

/// Returns a random (version 4) UUID and a newline, as the kernel writes it.
fn uuid(bytes: [u8; 16]) -> String {
    const VERSION: u128 = 0x4 << 76;
    const VARIANT: u128 = 0x2 << 62;
    let number = u128::from_be_bytes(bytes) & !(0xf << 76) & !(0x3 << 62) | VERSION | VARIANT;
    let field = |shift: u32, bits: u32| (number >> shift) & ((1 << bits) - 1);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}\n",
        field(96, 32),
        field(80, 16),
        field(64, 16),
        field(48, 16),
        field(0, 48)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_leads_a_message_by_its_delivery_is_right() {
        for (milliseconds, right) in [
            (-30, false),
            (-10, true),
            (0, true),
            (1_999, true),
            (2_001, false),
        ] {
            assert_eq!(is_plausible(milliseconds * 1_000_000, A_DELIVERY), right);
        }
    }

    #[test]
    fn uuids_have_their_version_and_variant() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff\n");
        assert_eq!(uuid([0; 16]), "00000000-0000-4000-8000-000000000000\n");
    }
}
