//! Loads the template in the directory that is its argument, forks it, and prints on stdout the
//! output of a program in the clone. It shows that a process can fork a template that another
//! process made.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "it fails its test by panicking"
)]

use hearth_agent::client::Command;
use hearth_tests::{Guest, error_chain};
use hearth_vmm::Template;

#[tokio::main]
async fn main() {
    let dir = std::env::args_os().nth(1).expect("a directory");
    let trusted = std::env::args_os().nth(2).is_some();
    let template = if trusted {
        Template::load_trusted(dir)
    } else {
        Template::load(dir)
    };
    let template = template.unwrap_or_else(|error| panic!("{}", error_chain(&error)));
    let guest = Guest::of(&template).await;
    let output = guest.run(Command::new("cat").arg("/etc/machine-id")).await;
    let own = String::from_utf8_lossy(&output.stdout);
    assert_eq!(own.trim_end(), guest.instance.to_string());
    print!("{own}");
}
