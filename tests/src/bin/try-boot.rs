//! Tries to boot a guest of one instruction and prints what came of it, in one line each: the
//! outcome, the error with its causes, and what threads and descriptors of a VM are left.
//! For tests that need a process in a bad place: no `/dev/kvm`, no permission, no descriptors.

use std::fmt::Write;

use hearth_tests::{Footprint, error_chain, flat::Code};
use hearth_vmm::{Vm, VmConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

fn main() {
    let limit = getrlimit(Resource::Nofile);
    let outcome = VmConfig::flat(Code::new().spin().bytes())
        .memory_mib(32)
        .build()
        .map_err(Into::into)
        .and_then(|config| Vm::boot(&config));
    let mut text = String::new();
    match outcome {
        Ok(vm) => {
            vm.destroy();
            text.push_str("booted\n");
        }
        Err(error) => {
            // Without a free descriptor one cannot look.
            let lifted = Rlimit {
                current: limit.maximum,
                ..limit
            };
            let _ = setrlimit(Resource::Nofile, lifted);
            let after = Footprint::now();
            let _ = writeln!(text, "refused: {error:?}");
            let _ = writeln!(text, "text: {}", error_chain(&error));
            // The library keeps its event threads and /dev/kvm from the first success on; a VM leaves
            // nothing.
            let kept = |name: &String| name.starts_with("hearth-events");
            let threads = after.threads.keys().filter(|name| !kept(name));
            let _ = writeln!(text, "threads: {}", threads.count());
            let vms = after.fds.keys().filter(|name| name.contains("kvm-v"));
            let _ = writeln!(text, "vm descriptors: {}", vms.count());
        }
    }
    print!("{text}");
}
