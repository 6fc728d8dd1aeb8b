//! Selects how `hearth-init` is built.
//!
//! Linked statically (`-Ctarget-feature=+crt-static`, profile `guest`) it is *freestanding*: no C
//! library, no standard library, and its own start-up code. It is kept small because the guest's
//! kernel unpacks it: on an emulated host (ring 0 emulated) that takes about a million instructions
//! per MiB, and a static C library alone is 0.7 MiB. Otherwise the same program is built on the
//! standard library, for tests.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(freestanding)");
    println!("cargo::rerun-if-changed=build.rs");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        println!("cargo::rustc-cfg=freestanding");
        for arg in [
            "-nostartfiles",
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,-z,noseparate-code",
            "-Wl,--build-id=none",
        ] {
            println!("cargo::rustc-link-arg-bin=hearth-init={arg}");
        }
    }
}
