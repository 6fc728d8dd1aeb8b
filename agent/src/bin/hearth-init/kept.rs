//! Files that every clone rewrites. They are opened once, in the template: where ring 0 is
//! emulated, looking up and opening a file costs more than everything else done with it.

use rustix::{
    fd::OwnedFd,
    fs::{Mode, OFlags, fstat, open},
    io::{Errno, pwrite},
};

/// A file that is written as a whole, repeatedly, through a cached descriptor.
#[derive(Debug)]
pub(crate) struct Kept {
    path: &'static str,
    /// Whether it is a file of the kernel; otherwise it is an ordinary file, created if missing.
    is_kernels: bool,
    fd: Option<OwnedFd>,
}

impl Kept {
    /// A kernel file (procfs, sysfs), for which each write stands alone.
    pub(crate) const fn of_kernel(path: &'static str) -> Self {
        Self {
            path,
            is_kernels: true,
            fd: None,
        }
    }

    /// An ordinary file, readable by all.
    pub(crate) const fn plain(path: &'static str) -> Self {
        Self {
            path,
            is_kernels: false,
            fd: None,
        }
    }

    /// Replaces the file's content by `content`.
    pub(crate) fn put(&mut self, content: &[u8]) -> Result<(), Errno> {
        if let Some(fd) = self.fd.take_if(|fd| self.is_kernels || fits(fd, content))
            && put(&fd, content).is_ok()
        {
            self.fd = Some(fd);
            return Ok(());
        }
        let extra = if self.is_kernels {
            OFlags::empty()
        } else {
            OFlags::CREATE | OFlags::TRUNC
        };
        let mode = Mode::from_raw_mode(0o444);
        let fd = open(self.path, OFlags::WRONLY | OFlags::CLOEXEC | extra, mode)?;
        put(&fd, content)?;
        self.fd = Some(fd);
        Ok(())
    }
}

/// Whether the descriptor is still, as far as can be seen, the file at its path, and `content`
/// covers all that it holds.
fn fits(fd: &OwnedFd, content: &[u8]) -> bool {
    fstat(fd).is_ok_and(|stat| {
        stat.st_nlink > 0 && u64::try_from(stat.st_size) == Ok(content.len() as u64)
    })
}

fn put(fd: &OwnedFd, content: &[u8]) -> Result<(), Errno> {
    match pwrite(fd, content, 0)? {
        written if written == content.len() => Ok(()),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, string::String};

    use super::*;

    #[test]
    fn a_file_is_replaced_whatever_was_done_to_it_meanwhile() {
        let dir = std::env::temp_dir().join(std::format!("hearth-kept-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("file");
        let name: &'static str = String::from(path.to_str().unwrap()).leak();
        let mut kept = Kept::plain(name);
        let mut put = |content: &str| {
            kept.put(content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(name).unwrap(), content);
        };
        put("one");
        put("two");
        put("shorter");
        put("x");
        // Another file is at the path now, or none.
        fs::rename(&path, dir.join("moved")).unwrap();
        fs::remove_file(dir.join("moved")).unwrap();
        put("y");
        fs::remove_file(&path).unwrap();
        fs::write(&path, "theirs").unwrap();
        put("z");
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_tried_anew_each_time() {
        let mut kept = Kept::of_kernel("/proc/no-such-file");
        assert_eq!(kept.put(b"1"), Err(Errno::NOENT));
        assert_eq!(kept.put(b"1"), Err(Errno::NOENT));
    }
}
