//! Limits a VM's share of processor time.
//!
//! Each vCPU thread has a timer on its own processor clock that kicks it out of the guest after
//! every slice that it used: an idle guest costs nothing. The thread then charges the time to the
//! VM's [`Account`] and, if that is overdrawn, is idle until the next period adds time. Time used
//! beyond the balance is a debt, so that the share is exact in the long run.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::kick::kick_signal;

/// Interval at which time is added to an account.
const PERIOD: Duration = Duration::from_millis(100);
/// Processor time after which a vCPU charges its account.
const SLICE: Duration = Duration::from_millis(5);

/// The processor time that a VM may still use.
#[derive(Debug)]
pub(crate) struct Account {
    percent: u32,
    balance: Mutex<Balance>,
}

#[derive(Debug)]
struct Balance {
    /// Nanoseconds; a negative balance is a debt.
    left: i64,
    /// When the next period begins.
    next: Instant,
}

impl Account {
    /// Returns an account of `percent` of one processor.
    pub(crate) fn new(percent: u32) -> Self {
        let left = pay(percent, 1);
        let next = Instant::now() + PERIOD;
        let balance = Mutex::new(Balance { left, next });
        Self { percent, balance }
    }

    /// Charges `used`; returns until when to be idle if no time is left.
    fn charge(&self, used: Duration, now: Instant) -> Option<Instant> {
        let mut balance = self.balance.lock().unwrap_or_else(|e| e.into_inner());
        let used = i64::try_from(used.as_nanos()).unwrap_or(i64::MAX);
        balance.left = balance.left.saturating_sub(used);
        if let Some(late) = now.checked_duration_since(balance.next) {
            let periods = late.as_nanos() / PERIOD.as_nanos() + 1;
            let periods = u32::try_from(periods).unwrap_or(u32::MAX);
            let next = balance.next.checked_add(PERIOD * periods);
            balance.next = next.unwrap_or(now + PERIOD);
            // Unused time is kept up to that of one period.
            let most = pay(self.percent, 1);
            balance.left = balance
                .left
                .saturating_add(pay(self.percent, periods))
                .min(most);
        }
        (balance.left <= 0).then_some(balance.next)
    }
}

/// Returns the nanoseconds that `periods` periods add.
fn pay(percent: u32, periods: u32) -> i64 {
    let period = i64::try_from(PERIOD.as_nanos()).unwrap_or(i64::MAX);
    (period / 100)
        .saturating_mul(i64::from(percent))
        .saturating_mul(i64::from(periods))
}

/// Charges the calling thread's processor time to an account.
pub(super) struct Meter<'a> {
    account: &'a Account,
    charged: Duration,
    _timer: Timer,
}

impl<'a> Meter<'a> {
    /// Meters the calling thread from now on.
    pub(super) fn start(account: &'a Account) -> std::io::Result<Self> {
        Ok(Self {
            account,
            charged: thread_time(),
            _timer: Timer::start()?,
        })
    }

    /// Charges the time used since the last call; returns until when to be idle if no time is left.
    pub(super) fn charge(&mut self) -> Option<Instant> {
        let now = thread_time();
        let used = now.saturating_sub(self.charged);
        self.charged = now;
        self.account.charge(used, Instant::now())
    }
}

/// Returns the processor time of the calling thread.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// A timer that kicks the thread that made it after each [`SLICE`] of its processor time.
struct Timer(libc::timer_t);

impl Timer {
    fn start() -> std::io::Result<Self> {
        // SAFETY: all-zero bytes are a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal();
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both pointers are to locals that outlive the call; the signal's handler is
        // installed before any vCPU thread starts.
        let made = unsafe {
            libc::timer_create(
                libc::CLOCK_THREAD_CPUTIME_ID,
                &raw mut event,
                &raw mut timer,
            )
        };
        if made != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let timer = Self(timer);
        let slice = libc::timespec {
            tv_sec: 0,
            tv_nsec: i64::from(SLICE.subsec_nanos()),
        };
        let every = libc::itimerspec {
            it_interval: slice,
            it_value: slice,
        };
        // SAFETY: the timer was just made; the old setting is not asked for.
        let set =
            unsafe { libc::timer_settime(timer.0, 0, &raw const every, std::ptr::null_mut()) };
        if set != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `start` and is deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_overdrawn_account_rests_until_the_next_period() {
        let account = Account::new(20);
        let start = Instant::now();
        let next = account.balance.lock().unwrap().next;
        assert_eq!(account.charge(5 * MS, start), None);
        assert_eq!(account.charge(16 * MS, start), Some(next));
        assert_eq!(account.charge(Duration::ZERO, next), None);
    }

    #[test]
    fn debts_are_paid_off_and_nothing_is_saved_up() {
        let account = Account::new(10);
        let at = account.balance.lock().unwrap().next;
        // 10 ms at the start and 10 added: 40 is 20 too many. Two more periods pay that off, the
        // third leaves time to use.
        assert!(account.charge(40 * MS, at).is_some());
        assert!(account.charge(Duration::ZERO, at + PERIOD).is_some());
        assert!(account.charge(Duration::ZERO, at + 2 * PERIOD).is_some());
        assert!(account.charge(Duration::ZERO, at + 3 * PERIOD).is_none());
        let much_later = at + 1000 * PERIOD;
        assert!(account.charge(9 * MS, much_later).is_none());
        assert!(account.charge(9 * MS, much_later).is_none());
        assert!(account.charge(2 * MS, much_later).is_some());
        assert!(account.charge(Duration::MAX, much_later).is_some());
    }

    #[test]
    fn several_processors_may_be_granted() {
        let account = Account::new(250);
        let start = Instant::now();
        assert_eq!(account.charge(249 * MS, start), None);
        assert!(account.charge(MS, start).is_some());
    }
}
