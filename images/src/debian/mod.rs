//! Debian packages: the mirror, the selection of packages, and their files. Nothing is installed,
//! and the other sources of this machine are not used.

mod fetch;
mod mirror;
mod resolve;

use crate::cache::CacheError;
use crate::command::CommandError;

pub(crate) use fetch::Download;
pub(crate) use resolve::{newest, resolve};

/// The environment variable that names the Debian mirror to use: an address as in a line of apt's
/// `sources.list`.
const MIRROR_VARIABLE: &str = "HEARTH_DEBIAN_MIRROR";

/// Why packages could not be resolved or fetched.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DebianError {
    /// No Debian mirror is known.
    #[error("no Debian mirror is among apt's sources: set {MIRROR_VARIABLE} to the address of one")]
    NoMirror,
    /// The keys that Debian signs with are missing.
    #[error(
        "Debian's keys are not at {}: sudo apt-get install -y debian-archive-keyring",
        resolve::KEYRING
    )]
    NoKeys,
    /// The archive no longer has the locked versions.
    #[error(
        "Debian's archive no longer has {}: `hearth image lock NAME` pins what it has now (a recipe of Hearth's own \
         is then in ./NAME.toml)",
        packages.join(", ")
    )]
    Vanished {
        /// Name and version of each.
        packages: Vec<String>,
    },
    /// The archive's file of a package has another hash than the lock.
    #[error("the archive's files are not those of the lock: {}", packages.join(", "))]
    Mismatch {
        /// Name and version of each.
        packages: Vec<String>,
        /// apt's error.
        source: CommandError,
    },
    /// Packages cannot be fetched for another reason, mostly the network.
    #[error("cannot fetch {}", packages.join(", "))]
    Fetch {
        /// Name and version of each.
        packages: Vec<String>,
        /// apt's error.
        source: CommandError,
    },
    /// apt finds no set of packages that satisfies all dependencies.
    #[error("the packages could not be resolved")]
    Resolve(#[source] CommandError),
    /// apt's output could not be parsed.
    #[error("apt's answer has no line that names a package with its hash: {0:?}")]
    Answer(String),
    /// A program is missing or failed.
    #[error("apt could not be asked")]
    Command(#[from] CommandError),
    /// A file operation in the cache failed.
    #[error("the image cache is not usable")]
    Cache(#[from] CacheError),
}
