//! Builds the programs that tests run inside guests: without Cargo packages and statically linked,
//! because a guest has no libraries.

use std::{env, path::Path, process::Command};

fn main() {
    let source = "programs/attempts.rs";
    println!("cargo::rerun-if-changed={source}");
    println!("cargo::rerun-if-changed=build.rs");
    let variable = |name| env::var_os(name).unwrap_or_default();
    let built = Command::new(variable("RUSTC"))
        .args(["--edition", "2024", "-O", "-Ctarget-feature=+crt-static"])
        .args(["-Cpanic=abort", "-Cstrip=symbols", source, "-o"])
        .arg(Path::new(&variable("OUT_DIR")).join("attempts"))
        .status();
    assert!(
        matches!(&built, Ok(status) if status.success()),
        "{source} was not built: {built:?}"
    );
}
