//! The user's root file system: an EROFS image in persistent memory, read in place, below a layer
//! in the guest's memory that takes all writes.

use alloc::{ffi::CString, vec::Vec};
use core::time::Duration;

use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move},
    process::{chdir, chroot},
};

use crate::{clock, mounts::ROOT_SHARE};

/// The kernel parameters, which the kernel passes on in the environment: the image's device, and
/// the size of the layer.
const ROOT_WORD: &[u8] = b"hearth_root=";
const LAYER_WORD: &[u8] = b"hearth_layer=";
/// How long the image's device may take to appear, as it may be large and the host slow; and the
/// pause between two attempts.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(5);
const IMAGE: &str = "/.image";
const LAYER: &str = "/.layer";
const ROOT: &str = "/.root";
/// The directory that becomes `/tmp`.
const TEMPORARY: &str = "/.layer/tmp";

/// The kernel parameters of the root file system.
pub(crate) struct Root<'a> {
    device: &'a [u8],
    /// In tmpfs syntax: bytes, or with k, m, g or %.
    layer: Option<&'a [u8]>,
}

impl<'a> Root<'a> {
    /// Returns the parameters, if they name a device.
    pub(crate) fn named(environment: &'a [Vec<u8>]) -> Option<Self> {
        let value = |name: &[u8]| environment.iter().find_map(|word| word.strip_prefix(name));
        Some(Self {
            device: value(ROOT_WORD)?,
            layer: value(LAYER_WORD),
        })
    }
}

/// Makes the image's files the root of this process and of all that it starts. The former root,
/// with this program, stays in memory but has no path any more.
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
    // `/tmp` lies in the layer itself: nothing of the image is to be looked up there.
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

/// Mounts the image once its device is there: the kernel probes it in parallel.
fn mount_image(device: &[u8]) -> Result<(), Errno> {
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    let mut waited = Duration::ZERO;
    loop {
        // In place (DAX) if the kernel can: then no page of the image takes guest memory. A device
        // that is not there yet may appear a moment later; its errors say nothing about DAX.
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
