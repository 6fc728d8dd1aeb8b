//! Images that guests read in place: EROFS, uncompressed.

mod owner;

use std::fs::File;
use std::path::Path;

use crate::cache::{CacheError, io_error};
use crate::command::{self, CommandError};

pub(crate) use owner::own;

/// Guests plug images in by pieces of this size.
const GRANULE: u64 = 2 << 20;
/// The same tree gives the same bytes: no time, no chance, no attributes that this machine gave its files. No checksum of
/// the first block: owners are written into it later.
const FIXED: [&str; 6] = [
    "-T0",
    "-U00000000-0000-0000-0000-000000000000",
    "-x-1",
    "-Enosbcrc",
    "--all-root",
    "--quiet",
];

/// Why no image was made of a tree.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErofsError {
    /// `mkfs.erofs` is missing or failed.
    #[error(
        "the image was not made; mkfs.erofs is in the package erofs-utils (sudo apt-get install -y erofs-utils)"
    )]
    Mkfs(#[source] CommandError),
    /// The image has another layout than ours reads.
    #[error("the image that mkfs.erofs made has no {0} where it should be")]
    Layout(&'static str),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] CacheError),
}

/// Makes `image` of the files in `tree`. All belong to root.
pub(crate) fn make(tree: &Path, image: &Path) -> Result<(), ErofsError> {
    let mut mkfs = command::tool("mkfs.erofs");
    command::run(mkfs.args(FIXED).arg(image).arg(tree), |_| {}).map_err(ErofsError::Mkfs)?;
    let whole = || {
        let file = File::options().write(true).open(image)?;
        let bytes = file.metadata()?.len();
        file.set_len(bytes.next_multiple_of(GRANULE))?;
        file.sync_all()
    };
    whole().map_err(io_error("write", image))?;
    Ok(())
}
