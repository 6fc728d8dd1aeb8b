//! The user whose rights guests have.

use rustix::process::geteuid;

use super::Check;

pub(super) fn checks() -> Vec<Check> {
    vec![rights()]
}

/// A guest that breaks out of its VM has the rights of the process that it runs in.
fn rights() -> Check {
    let user = geteuid();
    if user.is_root() {
        Check::warn(
            "user",
            "root: a guest that broke out of its VM would be root on this machine",
            "run guests as an ordinary user who may open /dev/kvm: sudo usermod -aG kvm NAME",
        )
    } else {
        Check::ok("user", format!("{} (not root)", user.as_raw()))
    }
}
