//! A root file system of the user's: an EROFS image in persistent memory, read in place, and over
//! it a layer in the guest's memory that takes what is written.

use alloc::{ffi::CString, vec::Vec};
use core::time::Duration;

use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{chdir, chroot},
};

use crate::{clock, mounts::ROOT_SHARE};

/// The boot words, as the kernel hands them on in the environment: the image's device, and the size
/// of the layer.
const ROOT_WORD: &[u8] = b"hearth_root=";
const LAYER_WORD: &[u8] = b"hearth_layer=";
/// How long the image's device may take to come up, large as it is and slow as the host may be; and
/// between two looks.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);
const IMAGE: &str = "/.image";
const LAYER: &str = "/.layer";
const ROOT: &str = "/.root";
/// What becomes `/tmp`.
const TEMPORARY: &str = "/.layer/tmp";

/// What the boot words say of the root.
pub(crate) struct Root<'a> {
    device: &'a [u8],
    /// As tmpfs has it: bytes, or with k, m, g or %.
    layer: Option<&'a [u8]>,
}

impl<'a> Root<'a> {
    /// If the boot words name a device.
    pub(crate) fn named(environment: &'a [Vec<u8>]) -> Option<Self> {
        let value = |name: &[u8]| environment.iter().find_map(|word| word.strip_prefix(name));
        Some(Self {
            device: value(ROOT_WORD)?,
            layer: value(LAYER_WORD),
        })
    }
}

/// Makes the image's files the root of this process and all that it starts. What was the root, with
/// this program, stays in memory and has no name any more.
pub(crate) fn switch_to(root: &Root) -> Result<(), Errno> {
    for place in ["/dev", IMAGE, LAYER, ROOT] {
        make_dir(place)?;
    }
    let devices = mount(c"devtmpfs", "/dev", c"devtmpfs", MountFlags::NOSUID, None);
    match devices {
        Ok(()) | Err(Errno::BUSY) => {}
        Err(errno) => return Err(errno),
    }
    mount_image(root.device)?;
    let options = layer_options(root.layer)?;
    mount(
        c"tmpfs",
        LAYER,
        c"tmpfs",
        MountFlags::NODEV,
        options.as_c_str(),
    )?;
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

fn layer_options(size: Option<&[u8]>) -> Result<CString, Errno> {
    let Some(size) = size else {
        return Ok(ROOT_SHARE.into());
    };
    CString::new([b"mode=0755,size=", size].concat()).map_err(|_| Errno::INVAL)
}

/// Mounts the image once it is there: the kernel looks for it beside all else.
fn mount_image(device: &[u8]) -> Result<(), Errno> {
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    let mut waited = Duration::ZERO;
    loop {
        // In place if the kernel can: then no page of the image takes guest memory. A device that
        // is not there yet says nothing of that, and may be there a moment later.
        match mount(device, IMAGE, c"erofs", flags, c"dax=always") {
            Err(Errno::NXIO | Errno::NOENT | Errno::NODEV) if waited < PATIENCE => {
                clock::sleep(PAUSE);
                waited += PAUSE;
            }
            Err(Errno::INVAL) => return mount(device, IMAGE, c"erofs", flags, None),
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
