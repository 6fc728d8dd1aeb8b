//! Creates links to busybox for its applets that no package provides.
//!
//! The applet names are read from the busybox binary, which is not run. It has a sorted table of
//! names, each terminated by a zero byte.

use std::path::Path;

use super::RootError;
use super::tree_root::TreeRoot;
use crate::recipe::{RecipeError, Text};

const PROGRAM: &str = "/usr/bin/busybox";
const MAX_BYTES: u64 = 64 << 20;
/// The first names of the table, after another zero byte, and the maximum number of names.
const FIRST: &[u8] = b"\0[\0[[\0";
const MAX_NAMES: usize = 1024;
/// Applets that users do not call.
const LEFT_OUT: [&str; 2] = ["linuxrc", "init"];
/// Applets that belong in `/usr/sbin` (`busybox --list-full`).
const ADMINISTRATOR_S: &str = "acpid adjtimex arp arping blockdev brctl chroot crond depmod devmem fdisk findfs freeramdisk \
    fsfreeze fstrim getty halt httpd hwclock i2cdetect i2cdump i2cget i2cset i2ctransfer ifconfig ifdown ifup insmod ip \
    ipneigh klogd loadfont loadkmap logread losetup lsmod mdev mim mkdosfs mke2fs mkswap modinfo modprobe nameif nologin \
    partprobe pivot_root poweroff rdate reboot rmmod route run-init start-stop-daemon sulogin swapoff swapon switch_root \
    sysctl syslogd tc telnetd tunctl ubirename udhcpc udhcpd uevent vconfig watchdog";

pub(super) fn link(tree: &TreeRoot, recipe: &Text) -> Result<(), RootError> {
    let invalid = |problem: &str| RecipeError::Invalid {
        recipe: recipe.name.clone(),
        problem: problem.to_owned(),
    };
    if !tree.has(Path::new(PROGRAM)) {
        let problem = "applets are of busybox: add the package busybox-static";
        return Err(invalid(problem).into());
    }
    let program = tree.read(Path::new(PROGRAM), MAX_BYTES)?;
    let names = names(&program)
        .ok_or_else(|| invalid("its busybox has no table of applets: leave applets out"))?;
    for name in names.filter(|name| !LEFT_OUT.contains(name)) {
        let administrator_s = ADMINISTRATOR_S
            .split_whitespace()
            .any(|known| known == name);
        let dir = if administrator_s {
            "/usr/sbin"
        } else {
            "/usr/bin"
        };
        let link = Path::new(dir).join(name);
        if !tree.has(&link) {
            tree.symlink("/bin/busybox", &link)?;
        }
    }
    Ok(())
}

fn names(program: &[u8]) -> Option<impl Iterator<Item = &str>> {
    let at = program
        .windows(FIRST.len())
        .position(|part| part == FIRST)?;
    let table = program.get(at + 1..)?.split(|byte| *byte == 0);
    let is_name = |name: &&str| {
        let signs = |c: char| c.is_ascii_alphanumeric() || "[-_.+".contains(c);
        !name.is_empty() && name.len() < 32 && name.chars().all(signs) && !name.starts_with('.')
    };
    let names = table.map_while(|name| std::str::from_utf8(name).ok());
    Some(names.take_while(is_name).take(MAX_NAMES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_where_the_table_does() {
        let program = b"code\0[[\0\0[\0[[\0ash\0zcat\0\0more\0";
        let found: Vec<&str> = names(program).unwrap().collect();
        assert_eq!(found, ["[", "[[", "ash", "zcat"]);
        let found: Vec<&str> = names(b"\0[\0[[\0a/b\0c\0").unwrap().collect();
        assert_eq!(found, ["[", "[["]);
        assert!(names(b"no table").is_none());
    }
}
