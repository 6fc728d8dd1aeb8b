//! How the library's threads are made: by one thread that makes nothing else.
//!
//! A thread begins with what the one that makes it has: processors, control group, credentials,
//! priority. Those of whoever happens to need a thread say nothing about the VMs that it will serve
//! later.

use std::io;
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::signals;

/// Stack of a thread that runs the library's own code: that does not recurse.
pub(crate) const SMALL_STACK: usize = 256 << 10;
/// Stack of a thread that runs the embedding program's: as the standard library's threads have.
pub(crate) const LARGE_STACK: usize = 2 << 20;

type Body = Box<dyn FnOnce() + Send>;

/// A thread to make, and where to say whether that was possible.
struct Order {
    name: String,
    stack: usize,
    body: Body,
    made: Sender<io::Result<()>>,
}

struct Maker {
    /// A forked child has none of the threads of its parent.
    process: u32,
    orders: Sender<Order>,
}

/// Makes a thread that runs `body` on a stack of so many bytes; it is not waited for.
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
    // The thread never ends; if it did, nobody would answer either.
    let _ = maker.orders.send(order);
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    is_made.recv().map_err(gone)?
}

/// Makes a thread for the rest of the library, as its own are made: all signals but those that a
/// thread causes itself are blocked, and it has nothing of the calling thread. It is not waited
/// for.
///
/// # Errors
/// Why the host gives none.
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
                // Whoever asked for it waits.
                let _ = order.made.send(make(order.name, order.stack, order.body));
            }
        }),
    )?;
    let process = std::process::id();
    Ok(MAKER.get_or_init(|| Maker { process, orders }))
}

/// The calling thread may run where the process's first thread may: what an administrator or a
/// shell (taskset(1)) has decided for the program. Where that is not known it stays where it is.
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
