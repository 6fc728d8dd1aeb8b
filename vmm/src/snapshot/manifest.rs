//! The file `manifest` of a template on disk: all of it but the guest's memory.
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

use super::VmState;
use super::compat::Origin;
use super::images::Named;

/// Version of the format; others are refused. Raised whenever any struct below [`Manifest`]
/// changes, or what a vCPU is given that is not saved (its CPUID).
pub(crate) const FORMAT: u32 = 5;
/// Most bytes of a manifest: far more than 32 vCPUs and all connections of a device need.
pub(super) const MAX_BYTES: u64 = 4 << 20;

const MAGIC: [u8; 8] = *b"HRTHTMPL";
const HASHED: usize = 12;
const HEADER: usize = HASHED + 32;

/// A SHA-256. (The processors that run guests have instructions for it; the crate is used for the
/// images already.)
pub(super) type Digest = [u8; 32];

/// See the module's text.
#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub(super) origin: Origin,
    /// The name of the cache's entry that this is; empty for a template outside of a cache.
    pub(super) key: String,
    /// Of the memory; see [`copy_pages`](super::memory::copy_pages).
    pub(super) memory: Digest,
    /// The images of the guest, in their order.
    pub(super) images: Vec<Named>,
    pub(super) state: VmState,
}

/// What is wrong with a manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Defect {
    /// No template's at all.
    Magic,
    /// Another version's.
    Version(u32),
    /// Not what was written.
    Damaged,
}

/// The bytes of a manifest with these parts.
pub(super) fn encode(
    origin: &Origin,
    key: &str,
    memory: Digest,
    images: &[Named],
    state: &VmState,
) -> Result<Vec<u8>, postcard::Error> {
    // A tuple is encoded as the struct of its members.
    postcard::to_stdvec(&(origin, key, memory, images, state)).map(|body| seal_body(&body))
}

/// A manifest file with this body.
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
