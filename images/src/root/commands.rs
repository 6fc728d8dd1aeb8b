//! Commands of a recipe, run with the tree as their root: in namespaces of their own, where an ordinary user is root, there
//! is no network, and nothing of this machine's but a few devices.

use std::path::Path;

use super::RootError;
use crate::command;

const UNSHARE: [&str; 7] = [
    "--map-root-user",
    "--mount",
    "--pid",
    "--net",
    "--ipc",
    "--fork",
    "--kill-child",
];
/// $1 is the tree, $2 the command. The devices are gone with the namespace.
const ENTER: &str = r#"set -eu
mount -t tmpfs tmpfs "$1/dev"
for device in null zero random urandom; do
    : > "$1/dev/$device"
    mount --bind "/dev/$device" "$1/dev/$device"
done
mount -t proc proc "$1/proc" 2>/dev/null || :
umask 022
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
    SOURCE_DATE_EPOCH=0 chroot "$1" /bin/sh -c "$2"
"#;

pub(super) fn run(tree: &Path, commands: &[String]) -> Result<(), RootError> {
    let namespaces = || {
        let mut unshare = command::tool("unshare");
        unshare
            .args(UNSHARE)
            .args(["--", "/bin/sh", "-c"])
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        unshare
    };
    let try_it = r#"mount -t tmpfs tmpfs "$1/dev""#;
    let mut attempt = namespaces();
    command::run(attempt.args([try_it, "sh"]).arg(tree), |_| {})
        .map_err(RootError::NoNamespaces)?;
    for text in commands {
        let mut enter = namespaces();
        enter.args([ENTER, "sh"]).arg(tree).arg(text);
        command::run(&mut enter, |line| tracing::info!(command = text, "{line}")).map_err(
            |source| {
                let command = text.clone();
                RootError::Command { command, source }
            },
        )?;
    }
    Ok(())
}
