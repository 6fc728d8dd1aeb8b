//! Uses a cache of templates for a number of rounds, or until it is killed: `template-cache ROOT
//! LIMIT KEYS ROUNDS MILLISECONDS`. Each round takes the next of `KEYS` keys; building a template
//! that is not cached first sleeps for `MILLISECONDS`. Prints one line per round that says how the
//! template was found.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "it fails its test by panicking"
)]

use std::io::Write;
use std::time::Duration;

use hearth_tests::flat::{cached_template, flat_key};
use hearth_vmm::cache::TemplateCache;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| -> u64 {
        let word = words.get(index).expect("five arguments");
        word.parse().expect("a number")
    };
    let root = words.first().expect("five arguments");
    let (limit, keys, rounds) = (number(1), number(2), number(3));
    let pause = Duration::from_millis(number(4));
    let cache = TemplateCache::open(root, limit).expect("a cache");
    for round in 0..rounds {
        let key = flat_key(round % keys);
        let build = || {
            std::thread::sleep(pause);
            cached_template(round % keys)
        };
        let cached = cache.get_or_build(&key, build).expect("a template");
        println!("{:?}", cached.found);
        std::io::stdout().flush().expect("stdout");
    }
}
