//! Writes `/etc/ld.so.cache`, the list of libraries that the dynamic linker uses, so that programs
//! do not search directories at each start.
//!
//! `ldconfig` could write it, but the image's own is an untrusted program, and this machine's is
//! another version. The layout is that of glibc's `sysdeps/generic/dl-cache.h`, since 2.2.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::tree_root::TreeRoot;
use crate::cache::CacheError;

const CACHE: &str = "/etc/ld.so.cache";
const SETTINGS: &str = "/etc/ld.so.conf";
/// The linker's default directories.
const USUAL: [&str; 4] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib",
    "/usr/lib",
];
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 24;
const LITTLE_ENDIAN: u32 = 2;
/// The flags of an entry: for glibc on x86-64.
const KIND: u32 = 0x0303;
/// The limits of settings and libraries: more would be a mistake.
const MAX_SETTINGS_BYTES: u64 = 64 << 10;
const MAX_DIRECTORIES: usize = 256;
const MAX_LIBRARIES: usize = 16 << 10;
/// The bytes of an ELF header up to and including class, type and machine.
const ELF_BYTES: u64 = 20;

/// Writes the list, if the image has glibc's dynamic linker.
pub(super) fn index(tree: &TreeRoot) -> Result<(), CacheError> {
    if !tree.has(Path::new("/lib64/ld-linux-x86-64.so.2")) {
        return Ok(());
    }
    let mut found: BTreeMap<Name, Vec<u8>> = BTreeMap::new();
    for dir in directories(tree)? {
        for file in tree.names(&dir)?.unwrap_or_default() {
            let path = dir.join(&file);
            let Some(name) = Name::of(file) else { continue };
            if found.len() < MAX_LIBRARIES && !found.contains_key(&name) && is_library(tree, &path)
            {
                found.insert(name, path.into_os_string().into_encoded_bytes());
            }
        }
    }
    tree.write(Path::new(CACHE), &*layout(&found), 0o644)
}

/// Returns the directories of the settings, then the default ones.
fn directories(tree: &TreeRoot) -> Result<Vec<PathBuf>, CacheError> {
    let mut dirs = Vec::new();
    for line in lines(tree, Path::new(SETTINGS))? {
        let Some(pattern) = line.strip_prefix("include") else {
            dirs.push(line);
            continue;
        };
        let pattern = Path::new(pattern.trim());
        let (dir, last) = (pattern.parent(), pattern.file_name());
        let Some((dir, last)) = dir.zip(last.and_then(|name| name.to_str())) else {
            continue;
        };
        let Some((before, after)) = last.split_once('*') else {
            dirs.extend(lines(tree, pattern)?);
            continue;
        };
        for name in tree.names(dir)?.unwrap_or_default() {
            let name = name.to_string_lossy();
            if name.starts_with(before) && name.ends_with(after) {
                dirs.extend(lines(tree, &dir.join(&*name))?);
            }
        }
    }
    dirs.extend(USUAL.map(str::to_owned));
    let mut dirs: Vec<PathBuf> = dirs.into_iter().map(PathBuf::from).collect();
    dirs.retain(|dir| dir.is_absolute());
    dirs.truncate(MAX_DIRECTORIES);
    Ok(dirs)
}

fn lines(tree: &TreeRoot, file: &Path) -> Result<Vec<String>, CacheError> {
    if !tree.has(file) {
        return Ok(Vec::new());
    }
    let text = tree.read(file, MAX_SETTINGS_BYTES)?;
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter_map(|line| line.split('#').next());
    let lines = lines.map(|line| line.trim().to_owned());
    Ok(lines.filter(|line| !line.is_empty()).collect())
}

fn is_library(tree: &TreeRoot, path: &Path) -> bool {
    let Ok(head) = tree.read(path, ELF_BYTES) else {
        return false;
    };
    // ELF, 64 bits, little-endian; a shared object for x86-64 (the ELF specification's e_ident,
    // e_type, e_machine).
    head.starts_with(b"\x7fELF\x02\x01") && head.ends_with(&[3, 0, 62, 0])
}

/// The name of a library. Names are ordered as in the list.
#[derive(Debug, PartialEq, Eq)]
struct Name(Vec<u8>);

impl Name {
    fn of(file: OsString) -> Option<Self> {
        let name = file.into_encoded_bytes();
        let named = name.starts_with(b"lib") || name.starts_with(b"ld-");
        let plain = |byte: &u8| byte.is_ascii_graphic();
        // Numbers that would overflow in the linker's comparison are not versions.
        let mut numbers = name.split(|byte| !byte.is_ascii_digit());
        let taken = named
            && name.windows(3).any(|part| part == b".so")
            && name.iter().all(plain)
            && numbers.all(|digits| digits.len() < 10);
        taken.then_some(Self(name))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Name {
    /// Compares like glibc's `_dl_cache_libcmp`: numbers by value, and after all other characters.
    fn cmp(&self, other: &Self) -> Ordering {
        let (mut one, mut two) = (&*self.0, &*other.0);
        loop {
            let (Some(a), Some(b)) = (one.first(), two.first()) else {
                return one.len().cmp(&two.len());
            };
            let order = match (a.is_ascii_digit(), b.is_ascii_digit()) {
                (true, true) => number(&mut one).cmp(&number(&mut two)),
                (true, false) => Ordering::Greater,
                (false, true) => Ordering::Less,
                (false, false) => {
                    let order = a.cmp(b);
                    one = one.get(1..).unwrap_or_default();
                    two = two.get(1..).unwrap_or_default();
                    order
                }
            };
            if order != Ordering::Equal {
                return order;
            }
        }
    }
}

/// Removes the number at the start of the text, and returns it.
fn number(text: &mut &[u8]) -> u64 {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = text.split_at(digits);
    *text = rest;
    let value = |sum: u64, digit: &u8| sum.saturating_mul(10).saturating_add((digit - b'0').into());
    number.iter().fold(0, value)
}

/// Returns the file: a header, entries from the greatest name to the least, and their strings.
fn layout(found: &BTreeMap<Name, Vec<u8>>) -> Vec<u8> {
    let mut strings = Vec::new();
    let mut entries = Vec::new();
    let begin = HEADER_BYTES + ENTRY_BYTES * found.len();
    let mut place = |text: &[u8]| {
        let at = begin + strings.len();
        strings.extend_from_slice(text);
        strings.push(0);
        number_of(at)
    };
    for (name, path) in found.iter().rev() {
        let (key, value) = (place(&name.0), place(path));
        // The rest is zero: any kernel version (`osversion`) and any processor (`hwcap`) will do.
        for word in [KIND, key, value, 0, 0, 0] {
            entries.extend(word.to_le_bytes());
        }
    }
    let mut file = MAGIC.to_vec();
    let sizes = [number_of(found.len()), number_of(strings.len())];
    // Then the byte order, no extension, and three unused words.
    for word in sizes.into_iter().chain([LITTLE_ENDIAN, 0, 0, 0, 0]) {
        file.extend(word.to_le_bytes());
    }
    file.extend(entries);
    file.extend(strings);
    file
}

/// Converts an offset or size, which the limits above keep far below 4 GiB.
fn number_of(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command;

    #[test]
    fn names_are_in_the_linker_s_order() {
        let name = |text: &str| Name::of(text.into()).unwrap();
        let sorted = [
            "lib-a.so",
            "liba.so",
            "liba.so.2",
            "liba.so.10",
            "liba2.so",
            "libab.so",
        ];
        let mut names = sorted.map(name);
        names.reverse();
        names.sort();
        // A digit sorts after any other character.
        assert_eq!(
            names,
            [
                "lib-a.so",
                "liba.so",
                "liba.so.2",
                "liba.so.10",
                "libab.so",
                "liba2.so"
            ]
            .map(name)
        );
        for no in ["tool.so", "libfile", "liba.so.12345678901", "lib a.so"] {
            assert_eq!(Name::of(no.into()), None, "{no}");
        }
    }

    /// Reads the list with this machine's `ldconfig`.
    #[test]
    fn the_list_has_each_library_once_from_the_first_directory() {
        let dir = tempfile::tempdir().unwrap();
        let tree = TreeRoot::create(&dir.path().join("tree")).unwrap();
        let write =
            |path: &str, content: &[u8]| tree.write(Path::new(path), content, 0o644).unwrap();
        let mut library = vec![0; 64];
        library[..6].copy_from_slice(b"\x7fELF\x02\x01");
        library[16..20].copy_from_slice(&[3, 0, 62, 0]);
        index(&tree).unwrap();
        assert!(!tree.has(Path::new(CACHE)));
        write("/lib64/ld-linux-x86-64.so.2", &library);
        write(
            "/etc/ld.so.conf",
            b"# all\ninclude /etc/ld.so.conf.d/*.conf\n",
        );
        write("/etc/ld.so.conf.d/a.conf", b"/opt/lib # mine\n");
        write("/etc/ld.so.conf.d/a.old", b"/opt/old\n");
        write("/opt/lib/libx.so.2", &library);
        write("/usr/lib/libx.so.2", &library);
        write("/opt/old/libold.so", &library);
        write("/usr/lib/liby.so.10", &library);
        write("/usr/lib/libtext.so", b"INPUT(liby.so)");
        tree.symlink("/usr/lib/liby.so.10", Path::new("/usr/lib/liby.so.9"))
            .unwrap();
        tree.symlink("/etc/hostname", Path::new("/usr/lib/libout.so"))
            .unwrap();
        index(&tree).unwrap();
        let mut ldconfig = command::tool("/sbin/ldconfig");
        let cache = tree.path().join("etc/ld.so.cache");
        let Ok(said) = command::output(ldconfig.arg("-p").arg("-C").arg(cache)) else {
            use std::io::Write;
            let _ = std::io::stderr().write_all(b"\nNOT MEASURED: no ldconfig\n");
            return;
        };
        let said: Vec<&str> = said.lines().skip(1).map(str::trim).collect();
        assert_eq!(
            said,
            [
                "liby.so.10 (libc6,x86-64) => /usr/lib/liby.so.10",
                "liby.so.9 (libc6,x86-64) => /usr/lib/liby.so.9",
                "libx.so.2 (libc6,x86-64) => /opt/lib/libx.so.2",
            ]
        );
    }
}
