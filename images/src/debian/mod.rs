//! Debian packages: from which mirror, which of them, and their files. Nothing is installed, and
//! none of this machine's other sources takes part.

mod fetch;
mod mirror;
mod resolve;

use crate::cache::CacheError;
use crate::command::CommandError;

pub(crate) use fetch::Download;
pub(crate) use resolve::{newest, resolve};

/// Names the Debian mirror to use, such as the address in a line of apt's `sources.list`.
const MIRROR_VARIABLE: &str = "HEARTH_DEBIAN_MIRROR";

/// Why there are no packages.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DebianError {
    /// No mirror of Debian is known.
    #[error("no Debian mirror is among apt's sources: set {MIRROR_VARIABLE} to the address of one")]
    NoMirror,
    /// The keys that Debian signs with are missing.
    #[error(
        "Debian's keys are not at {}: sudo apt-get install -y debian-archive-keyring",
        resolve::KEYRING
    )]
    NoKeys,
    /// The archive moved on to other versions.
    #[error(
        "Debian's archive no longer has {}: `hearth image lock NAME` pins what it has now (a recipe of Hearth's own \
         is then in ./NAME.toml)",
        packages.join(", ")
    )]
    Vanished {
        /// Name and version of each.
        packages: Vec<String>,
    },
    /// The archive has something else under a package's name.
    #[error("the archive's files are not those of the lock: {}", packages.join(", "))]
    Mismatch {
        /// Name and version of each.
        packages: Vec<String>,
        /// What apt said.
        source: CommandError,
    },
    /// Packages cannot be had for another reason: the network, mostly.
    #[error("cannot fetch {}", packages.join(", "))]
    Fetch {
        /// Name and version of each.
        packages: Vec<String>,
        /// What apt said.
        source: CommandError,
    },
    /// apt does not find packages that fit together.
    #[error("the packages could not be resolved")]
    Resolve(#[source] CommandError),
    /// apt's plan is not understood.
    #[error("apt's answer has no line that names a package with its hash: {0:?}")]
    Answer(String),
    /// A program is missing or failed.
    #[error("apt could not be asked")]
    Command(#[from] CommandError),
    /// The cache failed.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}
