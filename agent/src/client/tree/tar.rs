//! The tar format, as far as trees need it: ustar, with pax and GNU headers for values that do not
//! fit.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Component, Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::{Node, TreeEntry, TreeError};

const BLOCK: usize = 512;
/// Most bytes of an extension of the next entry's header (a long name, or pax records). No valid
/// one is longer.
const LONGEST_EXTENSION: u64 = 64 << 10;
/// The largest number that eleven octal digits hold.
const LARGEST_OCTAL: u64 = 0o777_7777_7777;

// Byte ranges of the fields in a header block.
const NAME: std::ops::Range<usize> = 0..100;
const MODE: std::ops::Range<usize> = 100..108;
const UID: std::ops::Range<usize> = 108..116;
const GID: std::ops::Range<usize> = 116..124;
const SIZE: std::ops::Range<usize> = 124..136;
const MODIFIED: std::ops::Range<usize> = 136..148;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const KIND: usize = 156;
const TARGET: std::ops::Range<usize> = 157..257;
const MAGIC: std::ops::Range<usize> = 257..265;
const PREFIX: std::ops::Range<usize> = 345..500;

/// Reads an archive, entry by entry. Its `AsyncRead` returns the current entry's content.
pub(super) struct Reader<'a, R> {
    stream: &'a mut R,
    /// The number of unread bytes of the current entry's content, and below that of the padding
    /// after it.
    rest: u64,
    padding: u64,
}

/// Values for the next entry from the extension headers before it.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

impl<'a, R: AsyncRead + Unpin> Reader<'a, R> {
    pub(super) fn new(stream: &'a mut R) -> Self {
        Self {
            stream,
            rest: 0,
            padding: 0,
        }
    }

    /// Returns the next entry; none at the end. The unread rest of the previous entry must be
    /// skipped first.
    pub(super) async fn next(&mut self) -> Result<Option<TreeEntry>, TreeError> {
        let mut extension = Extension::default();
        loop {
            let Some(header) = self.header().await? else {
                return Ok(None);
            };
            let size = number(field(&header, SIZE))?;
            match header.get(KIND) {
                Some(b'L') => extension.path = Some(text(&self.extension(size).await?)),
                Some(b'K') => extension.target = Some(text(&self.extension(size).await?)),
                Some(b'x') => extension.read_pax(&self.extension(size).await?)?,
                // A global header applies to the whole archive; nothing in it matters here.
                Some(b'g') => drop(self.extension(size).await?),
                Some(&kind) => match self.entry(kind, &header, size, extension)? {
                    Some(entry) => return Ok(Some(entry)),
                    None => {
                        self.skip_rest().await?;
                        extension = Extension::default();
                    }
                },
                None => return Err(TreeError::BadArchive("a header is too short")),
            }
        }
    }

    /// Skips to the next header.
    pub(super) async fn skip_rest(&mut self) -> Result<(), TreeError> {
        let rest = std::mem::take(&mut self.rest).saturating_add(std::mem::take(&mut self.padding));
        let mut rest_of_it = (&mut *self.stream).take(rest);
        let skipped = tokio::io::copy(&mut rest_of_it, &mut tokio::io::sink()).await;
        match skipped.map_err(TreeError::host)? {
            count if count < rest => Err(TreeError::BadArchive("it ends too early")),
            _ => Ok(()),
        }
    }

    fn entry(
        &mut self,
        kind: u8,
        header: &[u8; BLOCK],
        size: u64,
        extension: Extension,
    ) -> Result<Option<TreeEntry>, TreeError> {
        let path = extension.path.unwrap_or_else(|| name(header));
        let path = PathBuf::from(OsString::from_vec(path));
        // Links have no content, whatever size their header has.
        let size = match kind {
            b'0' | 0 | b'7' => extension.size.unwrap_or(size),
            b'1' | b'2' => 0,
            _ => size,
        };
        self.rest = size;
        self.padding = padding(size);
        let node = match kind {
            // Old archives represent directories as files with a slash at the end.
            b'0' | 0 | b'7' if path.as_os_str().as_bytes().ends_with(b"/") => Node::Dir,
            b'0' | 0 | b'7' => Node::File { size },
            b'5' => Node::Dir,
            b'2' => {
                let target = extension
                    .target
                    .unwrap_or_else(|| text(field(header, TARGET)));
                Node::Link {
                    target: OsString::from_vec(target).into(),
                }
            }
            _ => return Err(TreeError::NotPlain(path)),
        };
        let Some(inside) = within(&path)? else {
            return Ok(None);
        };
        Ok(Some(TreeEntry {
            path: inside,
            mode: u32::try_from(number(field(header, MODE))? & 0o7777).unwrap_or(0o644),
            modified_s: number(field(header, MODIFIED))
                .map_or(0, |time| i64::try_from(time).unwrap_or(0)),
            node,
        }))
    }

    /// Returns the next header block; none at the end, which is marked by a block of zeros or by
    /// the end of the stream.
    async fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TreeError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let room = block.get_mut(filled..).unwrap_or_default();
            match self.stream.read(room).await.map_err(TreeError::host)? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(TreeError::BadArchive("it ends too early")),
                count => filled += count,
            }
        }
        if block.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        if number(field(&block, CHECKSUM))? != u64::from(checksum(&block)) {
            return Err(TreeError::BadArchive("a header's checksum is wrong"));
        }
        Ok(Some(block))
    }

    async fn extension(&mut self, size: u64) -> Result<Vec<u8>, TreeError> {
        if size > LONGEST_EXTENSION {
            return Err(TreeError::BadArchive("a header is too long"));
        }
        let mut content = Vec::new();
        let mut all = (&mut *self.stream).take(size + padding(size));
        let count = all.read_to_end(&mut content).await;
        if (count.map_err(TreeError::host)? as u64) < size + padding(size) {
            return Err(TreeError::BadArchive("it ends too early"));
        }
        content.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(content)
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Reader<'_, R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = usize::try_from(self.rest).unwrap_or(usize::MAX);
        let mut part = ReadBuf::new(buffer.initialize_unfilled());
        let mut part = part.take(most.min(part.remaining()));
        ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut part))?;
        let count = part.filled().len();
        buffer.advance(count);
        self.rest = self.rest.saturating_sub(count as u64);
        Poll::Ready(Ok(()))
    }
}

impl Extension {
    /// Reads records `LENGTH KEY=VALUE\n`; the length is that of the whole record.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), TreeError> {
        let bad = || TreeError::BadArchive("a pax header is malformed");
        while !records.is_empty() {
            let record = || {
                let space = records.iter().position(|&byte| byte == b' ')?;
                let length = decimal(records.get(..space)?)?;
                let length = usize::try_from(length).ok()?;
                let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
                let equals = record.iter().position(|&byte| byte == b'=')?;
                let value = record.get(equals + 1..)?;
                Some((record.get(..equals)?, value, records.get(length..)?))
            };
            let Some((key, value, rest)) = record() else {
                return Err(bad());
            };
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = Some(decimal(value).ok_or_else(bad)?),
                _ => {}
            }
            records = rest;
        }
        Ok(())
    }
}

/// Returns the path relative to the top of the tree; none for the top itself.
fn within(path: &Path) -> Result<Option<PathBuf>, TreeError> {
    let mut inside = PathBuf::new();
    for name in path.components() {
        match name {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            _ => return Err(TreeError::BadPath(path.to_owned())),
        }
    }
    let bytes = inside.as_os_str().as_bytes();
    if bytes.contains(&0) {
        return Err(TreeError::BadPath(path.to_owned()));
    }
    Ok((!bytes.is_empty()).then_some(inside))
}

/// Writes the header of an entry, preceded by a pax header for values that do not fit.
pub(super) async fn write_header(
    entry: &TreeEntry,
    archive: &mut (impl AsyncWrite + Unpin),
) -> Result<(), TreeError> {
    let path = entry.path.as_os_str().as_bytes();
    let (kind, size, target): (u8, u64, &[u8]) = match &entry.node {
        Node::Dir => (b'5', 0, b""),
        Node::File { size } => (b'0', *size, b""),
        Node::Link { target } => (b'2', 0, target.as_os_str().as_bytes()),
    };
    let mut records = Vec::new();
    if path.len() > NAME.len() {
        push_record(&mut records, b"path", path);
    }
    if target.len() > TARGET.len() {
        push_record(&mut records, b"linkpath", target);
    }
    if size > LARGEST_OCTAL {
        push_record(&mut records, b"size", size.to_string().as_bytes());
    }
    if !records.is_empty() {
        let length = records.len() as u64;
        let header = block(b"pax", b'x', 0o644, length, 0, b"");
        archive.write_all(&header).await.map_err(TreeError::host)?;
        archive.write_all(&records).await.map_err(TreeError::host)?;
        pad(length, archive).await?;
    }
    let modified = u64::try_from(entry.modified_s).unwrap_or(0);
    let header = block(path, kind, entry.mode, size, modified, target);
    archive.write_all(&header).await.map_err(TreeError::host)
}

/// Pads content of this size to a whole number of blocks.
pub(super) async fn pad(
    size: u64,
    archive: &mut (impl AsyncWrite + Unpin),
) -> Result<(), TreeError> {
    let zeros = [0; BLOCK];
    let count = usize::try_from(padding(size)).unwrap_or(0);
    let zeros = zeros.get(..count).unwrap_or_default();
    archive.write_all(zeros).await.map_err(TreeError::host)
}

/// Writes the end of the archive.
pub(super) async fn finish(archive: &mut (impl AsyncWrite + Unpin)) -> Result<(), TreeError> {
    let end = archive.write_all(&[0; 2 * BLOCK]).await;
    end.map_err(TreeError::host)?;
    archive.flush().await.map_err(TreeError::host)
}

fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    // The length counts its own digits.
    let mut length = rest + rest.to_string().len();
    if length.to_string().len() > rest.to_string().len() {
        length += 1;
    }
    records.extend_from_slice(length.to_string().as_bytes());
    for part in [b" ", key, b"=", value, b"\n"] {
        records.extend_from_slice(part);
    }
}

/// Returns a header block. A value that is too long for its field is truncated or capped; a pax
/// header has the whole value.
fn block(path: &[u8], kind: u8, mode: u32, size: u64, modified: u64, target: &[u8]) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    let mut put = |place: std::ops::Range<usize>, bytes: &[u8]| {
        for (to, from) in block
            .iter_mut()
            .skip(place.start)
            .take(place.len())
            .zip(bytes)
        {
            *to = *from;
        }
    };
    put(NAME, path);
    put(MODE, format!("{mode:07o}\0").as_bytes());
    put(UID, b"0000000\0");
    put(GID, b"0000000\0");
    put(
        SIZE,
        format!("{:011o} ", size.min(LARGEST_OCTAL)).as_bytes(),
    );
    put(
        MODIFIED,
        format!("{:011o} ", modified.min(LARGEST_OCTAL)).as_bytes(),
    );
    put(KIND..KIND + 1, &[kind]);
    put(TARGET, target);
    put(MAGIC, b"ustar\x0000");
    let sum = format!("{:06o}\0 ", checksum(&block));
    for (to, from) in block.iter_mut().skip(CHECKSUM.start).zip(sum.bytes()) {
        *to = from;
    }
    block
}

/// Returns the sum of all bytes of a header, with blanks in place of the checksum itself.
fn checksum(block: &[u8; BLOCK]) -> u32 {
    let bytes = block.iter().enumerate();
    bytes
        .map(|(place, &byte)| match CHECKSUM.contains(&place) {
            true => u32::from(b' '),
            false => u32::from(byte),
        })
        .sum()
}

fn field(block: &[u8; BLOCK], place: std::ops::Range<usize>) -> &[u8] {
    block.get(place).unwrap_or_default()
}

fn name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = text(field(header, NAME));
    let prefix = text(field(header, PREFIX));
    // GNU archives have other fields at the place of the prefix.
    match field(header, MAGIC) == b"ustar\x0000" && !prefix.is_empty() {
        true => [prefix.as_slice(), &name].join(&b'/'),
        false => name,
    }
}

/// Returns the bytes before the first zero.
fn text(bytes: &[u8]) -> Vec<u8> {
    bytes
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default()
        .to_vec()
}

/// Parses a number: octal digits, or, if the first byte is 0x80, the other bytes as a big-endian
/// number.
fn number(field: &[u8]) -> Result<u64, TreeError> {
    let bad = || TreeError::BadArchive("a number in a header is malformed");
    if let Some((0x80, rest)) = field.split_first() {
        let Some((zeros, low)) = rest.split_last_chunk::<7>() else {
            return Err(bad());
        };
        let low = low.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        return match zeros.iter().all(|&byte| byte == 0) {
            true => Ok(low),
            false => Err(bad()),
        };
    }
    let digits: Vec<u8> = field
        .iter()
        .copied()
        .skip_while(|&byte| byte == b' ')
        .take_while(|&byte| byte != b' ' && byte != 0)
        .collect();
    if digits.is_empty() {
        return Ok(0);
    }
    let digits = std::str::from_utf8(&digits).map_err(|_| bad())?;
    u64::from_str_radix(digits, 8).map_err(|_| bad())
}

fn decimal(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}
