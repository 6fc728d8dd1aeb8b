//! The pmem images of a template on disk. They are not part of it: the template identifies them by
//! their content, and the caller that loads it passes their files. (A path in the template would
//! let its author make this process read any file.)

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::manifest::Digest;
use super::store::{StoreError, io_error};
use crate::saved::VmState;
use crate::virtio::DeviceState;
use crate::virtio::pmem::{PmemImage, PmemState, place};

/// Most physical address bits that a processor has (Intel SDM volume 3, section 4.1.4). KVM checks
/// that those of this processor are enough.
const ADDRESS_BITS: u32 = 52;

/// The entry of an image in a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Named {
    bytes: u64,
    digest: Digest,
}

fn of(state: &VmState) -> impl Iterator<Item = &PmemState> {
    let devices = state.transports.iter().map(|transport| &transport.device);
    devices.filter_map(|device| match device {
        DeviceState::Pmem(image) => Some(image),
        _ => None,
    })
}

/// Returns the manifest entries for the images of a template of this process, in their order.
pub(super) fn name(dir: &Path, state: &VmState) -> Result<Vec<Named>, StoreError> {
    let named = |saved: &PmemState| {
        // A template that was made or loaded here has its images.
        let image = saved.image.as_ref();
        let image = image.ok_or_else(|| StoreError::Damaged(dir.to_owned()))?;
        Ok(Named {
            bytes: image.bytes(),
            digest: image.digest().map_err(io_error("read an image of", dir))?,
        })
    };
    of(state).map(named).collect()
}

/// Whether the pmem devices have the sizes of these images, and the addresses that a VM gives them.
pub(super) fn fit(state: &VmState, named: &[Named]) -> bool {
    let sizes: Vec<u64> = named.iter().map(|named| named.bytes).collect();
    let saved: Vec<u64> = of(state).map(|image| image.bytes).collect();
    let places: Vec<u64> = of(state).map(|image| image.address).collect();
    let memory = state.hardware.memory_bytes;
    saved == sizes && place(memory, &sizes, ADDRESS_BITS).is_ok_and(|right| right == places)
}

/// Attaches the images at `paths` to the state. They must be those of the manifest, in the same
/// order. Their content is checked unless it is `trusted`.
pub(super) fn bring(
    dir: &Path,
    state: &mut VmState,
    named: &[Named],
    paths: &[&Path],
    trusted: bool,
) -> Result<(), StoreError> {
    if paths.len() != named.len() {
        return Err(StoreError::Images {
            path: dir.to_owned(),
            wanted: named.len(),
            given: paths.len(),
        });
    }
    let devices = state.transports.iter_mut();
    let saved = devices.filter_map(|transport| match &mut transport.device {
        DeviceState::Pmem(image) => Some(image),
        _ => None,
    });
    for ((saved, named), path) in saved.zip(named).zip(paths) {
        let image = PmemImage::open(path)?;
        let same = image.bytes() == named.bytes
            && (trusted || image.digest().map_err(io_error("read", *path))? == named.digest);
        if !same {
            return Err(StoreError::OtherImage {
                path: dir.to_owned(),
                image: path.to_path_buf(),
            });
        }
        saved.image = Some(image);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::memory::{GAP_END, GuestRam, MIB};
    use crate::snapshot::compat::Origin;
    use crate::snapshot::store::write_parts;
    use crate::snapshot::{Frozen, Template, fixtures, manifest};
    use crate::virtio::mmio::MmioTransport;
    use crate::virtio::pmem::{GRANULE, PmemDevice, PmemError};
    use crate::virtio::{Doorbell, Interrupt};

    const BYTES: u64 = 2 * MIB;
    const SECTION: u64 = 128 * MIB;

    /// Saves a template of a guest with two images as `t`, and returns the paths of the images.
    fn saved(dir: &Path) -> [PathBuf; 2] {
        let paths = [("a", GRANULE), ("b", 2 * GRANULE)].map(|(name, bytes)| {
            let path = dir.join(name);
            let file = File::create(&path).unwrap();
            file.set_len(bytes).unwrap();
            file.write_all_at(name.as_bytes(), bytes - 10).unwrap();
            path
        });
        let template = with(&paths, [GAP_END, GAP_END + SECTION]);
        let Frozen { state, memory } = &*template.frozen;
        fs::create_dir(dir.join("t")).unwrap();
        write_parts(&dir.join("t"), state, memory, &Origin::default(), "").unwrap();
        paths
    }

    fn with(paths: &[PathBuf; 2], places: [u64; 2]) -> Template {
        let ram = GuestRam::new(BYTES).unwrap();
        let mut state = fixtures::state(BYTES);
        for (path, address) in paths.iter().zip(places) {
            let device = PmemDevice::new(PmemImage::open(path).unwrap(), address);
            let (doorbell, interrupt) = (Doorbell::new().unwrap(), Interrupt::new().unwrap());
            let transport = MmioTransport::new(Box::new(device), ram.clone(), doorbell, interrupt);
            state.transports.push(transport.save());
        }
        let memory = crate::memory::memfd().unwrap();
        memory.set_len(BYTES).unwrap();
        Template::freeze(state, Arc::new(memory)).unwrap()
    }

    fn load(dir: &Path, images: &[&Path]) -> Result<Template, StoreError> {
        Template::load_for(&dir.join("t"), &Origin::default(), images)
    }

    fn load_trusted(dir: &Path, images: &[&Path]) -> Result<Template, StoreError> {
        Template::load_trusted_for(&dir.join("t"), &Origin::default(), images)
    }

    #[test]
    fn a_template_is_loaded_with_the_images_of_its_guest_and_no_others() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let [a, b] = &saved(dir);
        for load in [load, load_trusted] {
            let template = load(dir, &[a, b]).unwrap();
            let images = of(&template.frozen.state);
            assert!(images.into_iter().all(|saved| saved.image.is_some()));
            for wrong in [&[][..], &[a.as_path()], &[a, b, a]] {
                let error = load(dir, wrong).unwrap_err();
                let given = wrong.len();
                assert!(
                    matches!(error, StoreError::Images { wanted: 2, given: g, .. } if g == given),
                    "{error}"
                );
            }
            // Other sizes are noticed without reading the content.
            let error = load(dir, &[b, a]).unwrap_err();
            assert!(matches!(&error, StoreError::OtherImage { image, .. } if image == b));
            let error = load(dir, &[a, &dir.join("none")]).unwrap_err();
            assert!(
                matches!(error, StoreError::Pmem(PmemError::Open { .. })),
                "{error}"
            );
        }
        // A copy is accepted; a copy with one different byte only if it is trusted.
        let copy = dir.join("copy");
        fs::copy(b, &copy).unwrap();
        load(dir, &[a, &copy]).unwrap();
        let file = File::options().write(true).open(&copy).unwrap();
        file.write_all_at(b"x", GRANULE).unwrap();
        let error = load(dir, &[a, &copy]).unwrap_err();
        assert!(matches!(&error, StoreError::OtherImage { image, .. } if *image == copy));
        load_trusted(dir, &[a, &copy]).unwrap();
    }

    #[test]
    fn a_template_that_is_loaded_can_be_saved_again() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let [a, b] = &saved(dir);
        let template = load(dir, &[a, b]).unwrap();
        let again = name(dir, &template.frozen.state).unwrap();
        assert!(fit(&template.frozen.state, &again));
        // It cannot be saved once an image was truncated.
        File::options()
            .write(true)
            .open(b)
            .unwrap()
            .set_len(GRANULE)
            .unwrap();
        assert!(matches!(
            name(dir, &template.frozen.state),
            Err(StoreError::Io { .. })
        ));
    }

    #[test]
    fn images_that_lie_where_no_vm_has_them_are_no_templates() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path();
        let paths = &saved(dir);
        let [a, b] = paths;
        let right = [GAP_END, GAP_END + SECTION];
        let good = with(paths, right);
        let named = name(dir, &good.frozen.state).unwrap();
        let write = |template: &Template, named: &[Named], devices: usize| {
            let mut state = serde_copy(&template.frozen.state);
            state.transports.truncate(devices);
            let bytes = manifest::encode(&Origin::default(), "", digest(dir), named, &state);
            fs::write(dir.join("t/manifest"), bytes.unwrap()).unwrap();
            load(dir, &[a, b])
        };
        write(&good, &named, 4).unwrap();
        for places in [
            [0, right[1]],
            [right[0], right[0]],
            [right[1], right[0]],
            [right[0], right[1] + 4096],
            [right[0], u64::MAX - GRANULE],
        ] {
            let error = write(&with(paths, places), &named, 4).unwrap_err();
            assert!(
                matches!(error, StoreError::Damaged(_)),
                "{places:x?}: {error}"
            );
        }
        // The number of images differs from that of the devices.
        for (named, devices) in [(&named[..1], 4), (&[], 4), (&named[..], 3), (&named[..], 2)] {
            let error = write(&good, named, devices).unwrap_err();
            assert!(
                matches!(error, StoreError::Damaged(_)),
                "{devices}: {error}"
            );
        }
    }

    fn serde_copy(state: &VmState) -> VmState {
        postcard::from_bytes(&postcard::to_stdvec(state).unwrap()).unwrap()
    }

    /// The digest of the saved memory.
    fn digest(dir: &Path) -> Digest {
        let bytes = fs::read(dir.join("t/manifest")).unwrap();
        manifest::Manifest::decode(&bytes).unwrap().memory
    }
}
