//! Files that every clone writes anew. They are opened once, in the template: where ring 0 is
//! emulated, finding and opening a file costs more than all else that is done with it.

use rustix::{
    fd::OwnedFd,
    fs::{Mode, OFlags, fstat, open},
    io::{Errno, pwrite},
};

/// A file that is written as a whole, again and again.
#[derive(Debug)]
pub(crate) struct Kept {
    path: &'static str,
    /// Of the kernel's, or one of ours that is made if it is not there.
    is_kernels: bool,
    fd: Option<OwnedFd>,
}

impl Kept {
    /// A file of the kernel's, which takes each write for itself.
    pub(crate) const fn of_kernel(path: &'static str) -> Self {
        Self {
            path,
            is_kernels: true,
            fd: None,
        }
    }

    /// A file like any other, readable by all.
    pub(crate) const fn plain(path: &'static str) -> Self {
        Self {
            path,
            is_kernels: false,
            fd: None,
        }
    }

    /// Makes `content` the file's content.
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

/// Whether it is still the file at its path, as far as one can tell, and `content` covers all that
/// it holds.
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
        // Somebody else's file is at the place now, or none.
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
