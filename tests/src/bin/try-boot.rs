//! Tries to boot a guest of one instruction and prints the result, in one line each: the outcome,
//! the error with its causes, and how many threads and descriptors of a VM are left. For tests of a
//! process that lacks something: `/dev/kvm`, permission or free descriptors.

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
            // The footprint cannot be read without a free descriptor.
            let lifted = Rlimit {
                current: limit.maximum,
                ..limit
            };
            let _ = setrlimit(Resource::Nofile, lifted);
            let after = Footprint::now();
            let _ = writeln!(text, "refused: {error:?}");
            let _ = writeln!(text, "text: {}", error_chain(&error));
            // The library may keep its event threads and /dev/kvm; nothing of a VM may be left.
            let of_vm = |name: &&String| name.starts_with("hearth-vcpu");
            let threads = after.threads.keys().filter(of_vm).count();
            let _ = writeln!(text, "threads of a vm: {threads}");
            let vms = after.fds.keys().filter(|name| name.contains("kvm-v"));
            let _ = writeln!(text, "vm descriptors: {}", vms.count());
        }
    }
    print!("{text}");
}
