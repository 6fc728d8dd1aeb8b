//! Resources of the host that this process holds, as the kernel's files report them.

use std::fs;
use std::io;

/// Threads, descriptors and memory at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub fds: usize,
    /// Mappings of files, memory files included.
    pub mappings: usize,
    /// Resident memory of this process in KiB.
    pub rss_kib: u64,
    /// Memory of this process in KiB, shared pages divided among the processes that share them
    /// (`Pss`).
    pub pss_kib: u64,
    /// Memory of the host that could still be used, in KiB (`MemAvailable`).
    pub available_kib: u64,
}

impl Held {
    /// Reads the current values.
    ///
    /// # Errors
    /// If there is no Linux `/proc`.
    pub fn now() -> io::Result<Self> {
        Ok(Self {
            threads: count("/proc/self/task")?,
            // One of them is the descriptor of the directory itself.
            fds: count("/proc/self/fd")?.saturating_sub(1),
            mappings: mappings()?,
            rss_kib: kib("/proc/self/status", "VmRSS:")?,
            pss_kib: kib("/proc/self/smaps_rollup", "Pss:")?,
            available_kib: kib("/proc/meminfo", "MemAvailable:")?,
        })
    }
}

fn count(dir: &str) -> io::Result<usize> {
    Ok(fs::read_dir(dir)?.count())
}

/// Counts mappings of files. Anonymous memory is left out: the allocator and the C library map it
/// as they please.
fn mappings() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let names = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5));
    Ok(names.filter(|name| !name.starts_with('[')).count())
}

/// Returns the figure of the line that begins with `name`.
fn kib(file: &str, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(file)?;
    let figure = text.lines().find_map(|line| {
        let figure = line.strip_prefix(name)?.trim().strip_suffix("kB")?;
        figure.trim().parse().ok()
    });
    figure.ok_or_else(|| io::Error::other(format!("{file} has no line {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_shows() {
        let before = Held::now().unwrap();
        assert!(before.pss_kib > 0 && before.available_kib > before.pss_kib);
        let (waits, held) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || held.recv());
        let files: Vec<_> = (0..50)
            .map(|_| fs::File::open("/proc/self/stat").unwrap())
            .collect();
        let memory = vec![1_u8; 64 << 20];
        let after = Held::now().unwrap();
        // Other tests may run beside this one.
        assert!(after.threads > 1);
        assert!(after.fds >= before.fds + 40, "{before:?} {after:?}");
        assert!(
            after.pss_kib > before.pss_kib + (50 << 10),
            "{before:?} {after:?}"
        );
        assert!(after.rss_kib > before.rss_kib + (50 << 10));
        drop((waits, files, memory));
        thread.join().unwrap().unwrap_err();
    }
}
