//! The file `manifest` of a template on disk: the template without the guest's memory.
//!
//! ```text
//! offset  bytes
//!      0      8  "HRTHTMPL"
//!      8      4  format version, little endian
//!     12     32  SHA-256 of the bytes before and after this field
//!     44         a `Manifest` in postcard's encoding, to the end of the file
//! ```

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::compat::Origin;
use super::images::Named;
use crate::saved::VmState;

/// Version of the format; other versions are refused. Raised whenever any struct below [`Manifest`]
/// changes, or the vCPU state that is set but not saved (CPUID).
pub(crate) const FORMAT: u32 = 5;
/// Maximum size of a manifest in bytes: far more than 32 vCPUs and all connections of a device
/// need.
pub(super) const MAX_BYTES: u64 = 4 << 20;

const MAGIC: [u8; 8] = *b"HRTHTMPL";
const HASHED: usize = 12;
const HEADER: usize = HASHED + 32;

/// A SHA-256 digest. (The processors that run guests have instructions for it, and the `sha2` crate
/// is used for the images already.)
pub(super) type Digest = [u8; 32];

/// The body of a manifest file; see the module's documentation.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) origin: Origin,
    /// Key of the template's cache entry; empty for a template outside of a cache.
    pub(super) key: String,
    /// Digest of the memory; see [`copy_pages`](super::memory::copy_pages).
    pub(super) memory: Digest,
    /// The pmem images of the guest, in their order.
    pub(super) images: Vec<Named>,
    pub(super) state: VmState,
}

/// Why a file cannot be read as a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Defect {
    /// The file is not a manifest.
    Magic,
    /// The file has this other format version.
    Version(u32),
    /// The content is not what was written.
    Damaged,
}

/// Encodes a manifest file with these parts.
pub(super) fn encode(
    origin: &Origin,
    key: &str,
    memory: Digest,
    images: &[Named],
    state: &VmState,
) -> Result<Vec<u8>, postcard::Error> {
    // postcard encodes a tuple like the struct with these fields.
    postcard::to_stdvec(&(origin, key, memory, images, state)).map(|body| seal_body(&body))
}

/// Returns a manifest file with this body.
pub(super) fn seal_body(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend(MAGIC);
    bytes.extend(FORMAT.to_le_bytes());
    let digest = digest(&bytes, body);
    bytes.extend(digest);
    bytes.extend(body);
    bytes
}

impl Manifest {
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Defect> {
        let (magic, rest) = bytes.split_at_checked(MAGIC.len()).ok_or(Defect::Magic)?;
        if magic != MAGIC {
            return Err(Defect::Magic);
        }
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(Defect::Damaged)?;
        let version = u32::from_le_bytes(*version);
        if version != FORMAT {
            return Err(Defect::Version(version));
        }
        let (expected, body) = rest.split_first_chunk::<32>().ok_or(Defect::Damaged)?;
        let hashed = bytes.get(..HASHED).unwrap_or_default();
        if digest(hashed, body) != *expected {
            return Err(Defect::Damaged);
        }
        match postcard::take_from_bytes(body) {
            Ok((manifest, [])) => Ok(manifest),
            _ => Err(Defect::Damaged),
        }
    }
}

fn digest(before: &[u8], after: &[u8]) -> Digest {
    Sha256::new()
        .chain_update(before)
        .chain_update(after)
        .finalize()
        .into()
}
