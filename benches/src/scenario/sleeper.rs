//! The wake-up baseline: waking a sleeping thread, the least that the hand-off of a parked guest
//! can cost. Without any code of Hearth's.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A sleeping thread. Dropping this value ends the thread.
pub(super) struct Sleeper {
    state: Arc<(Mutex<State>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Asleep,
    Woken,
    Over,
}

impl Sleeper {
    /// Starts the thread.
    pub(super) fn start() -> Self {
        let state = Arc::new((Mutex::new(State::Asleep), Condvar::new()));
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            let (state, bell) = &*shared;
            let mut now = state.lock().unwrap_or_else(PoisonError::into_inner);
            while *now != State::Over {
                *now = State::Asleep;
                now = bell.wait(now).unwrap_or_else(PoisonError::into_inner);
            }
        });
        Self {
            state,
            thread: Some(thread),
        }
    }

    /// Wakes the thread, which goes back to sleep.
    pub(super) fn wake(&self) {
        self.set(State::Woken);
    }

    fn set(&self, to: State) {
        let (state, bell) = &*self.state;
        *state.lock().unwrap_or_else(PoisonError::into_inner) = to;
        bell.notify_one();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.set(State::Over);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
