//! Spawns the library's threads, all from one thread that does nothing else.
//!
//! A thread inherits processors, control group, credentials and priority from the thread that
//! spawns it. Those of the thread that happens to need another one have nothing to do with the VMs
//! that the new thread serves later.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::signals;

/// Stack size of a thread that runs only the library's own code, which does not recurse.
pub(crate) const SMALL_STACK: usize = 256 << 10;
/// Stack size of a thread that runs code of the embedding program: the standard library's default.
pub(crate) const LARGE_STACK: usize = 2 << 20;

type Body = Box<dyn FnOnce() + Send>;

/// A thread to spawn, and the channel for the result.
struct Order {
    name: String,
    stack: usize,
    body: Body,
    made: Sender<io::Result<()>>,
}

struct Maker {
    /// Id of the process that the maker thread is in: a forked child has none of its parent's
    /// threads.
    process: u32,
    orders: Sender<Order>,
}

/// Spawns a detached thread that runs `body` on a stack of `stack` bytes.
pub(crate) fn spawn(
    name: &str,
    stack: usize,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    let (name, body) = (name.to_owned(), Box::new(body));
    let maker = maker()?;
    if maker.process != std::process::id() {
        return make(name, stack, body);
    }
    let (made, is_made) = mpsc::channel();
    let order = Order {
        name,
        stack,
        body,
        made,
    };
    // The maker thread never ends; if it did, `recv` would fail as well.
    let _ = maker.orders.send(order);
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    is_made.recv().map_err(gone)?
}

/// Spawns a detached thread for the library's other crates, like the threads of this one: all
/// signals but those that a thread causes itself are blocked, and it inherits nothing from the
/// calling thread.
///
/// # Errors
/// The host's error when it cannot create a thread.
#[doc(hidden)]
pub fn spawn_neutral(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    spawn(name, LARGE_STACK, body)
}

fn make(name: String, stack: usize, body: Body) -> io::Result<()> {
    let builder = std::thread::Builder::new().name(name);
    signals::blocked(|| builder.stack_size(stack).spawn(body).map(drop))
}

fn maker() -> io::Result<&'static Maker> {
    static MAKER: OnceLock<Maker> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    if let Some(maker) = MAKER.get() {
        return Ok(maker);
    }
    let _one_at_a_time = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(maker) = MAKER.get() {
        return Ok(maker);
    }
    let (orders, todo) = mpsc::channel::<Order>();
    make(
        "hearth-threads".into(),
        SMALL_STACK,
        Box::new(move || {
            take_processors_of_the_process();
            for order in todo {
                // The requesting thread waits for this.
                let _ = order.made.send(make(order.name, order.stack, order.body));
            }
        }),
    )?;
    let process = std::process::id();
    Ok(MAKER.get_or_init(|| Maker { process, orders }))
}

/// Gives the calling thread the processors of the process's first thread, which an administrator or
/// a shell (taskset(1)) has chosen for the program. If these cannot be read, its own stay as they
/// are.
fn take_processors_of_the_process() {
    // SAFETY: all-zero is a valid set, of no processor.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let bytes = std::mem::size_of_val(&set);
    // SAFETY: the calls read and write a live set of that size; the id of a process is that of its
    // first thread.
    unsafe {
        if libc::sched_getaffinity(libc::getpid(), bytes, &raw mut set) == 0 {
            libc::sched_setaffinity(0, bytes, &raw const set);
        }
    }
}
