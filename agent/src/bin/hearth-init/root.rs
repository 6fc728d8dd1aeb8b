//! A root file system of the user's: an EROFS image in persistent memory, read in place, and over it a layer in the guest's
//! memory that takes what is written.

use core::time::Duration;

use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{chdir, chroot},
};

use crate::{clock, mounts::ROOT_SHARE};

/// The boot word, as the kernel hands it on in the environment: the image's device.
const WORD: &[u8] = b"hearth_root=";
/// How long the image's device may take to come up, large as it is and slow as the host may be; and between two looks.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);
const IMAGE: &str = "/.image";
const LAYER: &str = "/.layer";
const ROOT: &str = "/.root";
/// What becomes `/tmp`.
const TEMPORARY: &str = "/.layer/tmp";

/// The device that a boot word names.
pub(crate) fn device(environment: &[alloc::vec::Vec<u8>]) -> Option<&[u8]> {
    environment.iter().find_map(|word| word.strip_prefix(WORD))
}

/// Makes the image's files the root of this process and all that it starts. What was the root, with this program, stays
/// in memory and has no name any more.
pub(crate) fn switch_to(device: &[u8]) -> Result<(), Errno> {
    for place in ["/dev", IMAGE, LAYER, ROOT] {
        make_dir(place)?;
    }
    let devices = mount(c"devtmpfs", "/dev", c"devtmpfs", MountFlags::NOSUID, None);
    match devices {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(errno) => return Err(errno),
    }
    mount_image(device)?;
    mount(c"tmpfs", LAYER, c"tmpfs", MountFlags::NODEV, ROOT_SHARE)?;
    make_dir("/.layer/upper")?;
    make_dir("/.layer/work")?;
    make_dir(TEMPORARY)?;
    let layers = c"lowerdir=/.image,upperdir=/.layer/upper,workdir=/.layer/work";
    mount(c"overlay", ROOT, c"overlay", MountFlags::NODEV, layers)?;
    // In the layer itself: nothing of the image is to be looked for there.
    make_dir("/.root/tmp")?;
    mount_bind(TEMPORARY, "/.root/tmp")?;
    chdir(ROOT)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")
}

/// Mounts the image once it is there: the kernel looks for it beside all else.
fn mount_image(device: &[u8]) -> Result<(), Errno> {
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    let mut waited = Duration::ZERO;
    loop {
        // In place if the kernel can: then no page of the image takes guest memory.
        let mounted = mount(device, IMAGE, c"erofs", flags, c"dax=always")
            .or_else(|_| mount(device, IMAGE, c"erofs", flags, None));
        match mounted {
            Err(Errno::NXIO | Errno::NOENT | Errno::NODEV) if waited < PATIENCE => {
                clock::sleep(PAUSE);
                waited += PAUSE;
            }
            other => return other,
        }
    }
}

fn make_dir(place: &str) -> Result<(), Errno> {
    match mkdir(place, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}
