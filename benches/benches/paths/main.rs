//! Hot paths that need no guest. `cargo bench --bench paths` times them; `.ci/counts` has valgrind
//! count their instructions, which are repeatable where times are not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark fails by panicking"
)]

mod codec;
mod packets;
mod pool;
mod queue;
mod state;

use criterion::Criterion;

/// Runs a path once.
type Walk = Box<dyn FnMut()>;

/// A path's name, and the function that sets it up.
type Path = (&'static str, fn() -> Walk);

const PATHS: [Path; 9] = [
    ("vsock-packet-to-guest", packets::to_guest),
    ("vsock-packet-from-guest", packets::from_guest),
    ("vsock-connect-and-close", packets::connect),
    ("virtqueue-request", queue::request),
    ("state-of-a-vm", state::manifest),
    ("state-of-sockets", state::sockets),
    ("pool-acquire-release", pool::acquire_release),
    ("codec-exec", codec::exec),
    ("codec-output-16k", codec::output),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["--names"] => PATHS.iter().for_each(|(name, _)| println!("{name}")),
        // The cost of setting up does not depend on how often the path is run.
        ["--walk", name, times] => {
            let (_, ready) = PATHS.iter().find(|(known, _)| known == name).unwrap();
            let mut walk = ready();
            for _ in 0..times.parse().unwrap() {
                walk();
            }
        }
        _ => {
            let mut criterion = Criterion::default().configure_from_args();
            for (name, ready) in PATHS {
                let mut walk = ready();
                criterion.bench_function(name, |bencher| bencher.iter(&mut walk));
            }
            criterion.final_summary();
        }
    }
}
