//! The working set of a clone: pages that later clones need too, populated before they touch them.

use std::io;

use crate::memory::{GuestRam, PAGE_SIZE};
use crate::pagemap::{Page, each_page};

/// The pages that a clone has touched since its fork. Recorded once
/// ([`Vm::working_set`](crate::Vm::working_set)), for example after the clone's first answer, and
/// used for all later clones ([`Template::prefetch`](crate::Template::prefetch)).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    written: Vec<PageRange>,
    read: Vec<PageRange>,
}

/// A range of consecutive whole pages, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PageRange {
    addr: u64,
    len: u64,
}

impl WorkingSet {
    /// Records the pages of `ram`, a clone's memory, that were written (private) or read (shared
    /// with the template).
    pub(crate) fn of(ram: &GuestRam) -> io::Result<Self> {
        let mut set = Self::default();
        each_page(ram, |addr, page| {
            let ranges = match page {
                Page::Own => &mut set.written,
                Page::OfFile => &mut set.read,
            };
            match ranges.last_mut() {
                Some(last) if last.addr + last.len == addr => last.len += PAGE_SIZE,
                _ => ranges.push(PageRange {
                    addr,
                    len: PAGE_SIZE,
                }),
            }
        })?;
        Ok(set)
    }

    /// Returns the bytes that were written: each clone gets its own copy of these, as it would at
    /// its first write.
    #[must_use]
    pub fn written_bytes(&self) -> u64 {
        self.written.iter().map(|range| range.len).sum()
    }

    /// Returns the bytes that were only read, or that the host mapped beside such: all clones share
    /// these.
    #[must_use]
    pub fn read_bytes(&self) -> u64 {
        self.read.iter().map(|range| range.len).sum()
    }

    /// Populates these pages in `ram`, which no vCPU uses yet. A range that is not inside `ram` is
    /// skipped. Pages that the host refuses to populate (before Linux 5.14, or out of memory) are
    /// faulted in when the guest touches them.
    pub(crate) fn fill(&self, ram: &GuestRam) {
        let kinds = [
            (&self.written, libc::MADV_POPULATE_WRITE),
            (&self.read, libc::MADV_POPULATE_READ),
        ];
        for (ranges, advice) in kinds {
            for PageRange { addr, len } in ranges {
                let _ = ram.advise(*addr, *len, advice);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{MIB, Sharing};
    use crate::pagemap::private_bytes;

    #[test]
    fn the_next_clone_has_what_the_last_one_touched_and_its_own_copy_of_what_that_wrote() {
        let origin = GuestRam::new(4 * MIB).unwrap();
        let page = |number: u64| GuestAddress(number * PAGE_SIZE);
        for number in 0..64 {
            origin.map().write_obj(number as u8, page(number)).unwrap();
        }
        let clone = || {
            let file = Arc::clone(origin.file());
            GuestRam::map_file(file, 4 * MIB, Sharing::Private).unwrap()
        };
        let first = clone();
        assert_eq!(WorkingSet::of(&first).unwrap(), WorkingSet::default());
        for number in [3, 4, 40] {
            first.map().write_obj(0xffu8, page(number)).unwrap();
        }
        assert_eq!(first.map().read_obj::<u8>(page(20)).unwrap(), 20);
        let set = WorkingSet::of(&first).unwrap();
        assert_eq!(set.written.len(), 2, "{set:?}");
        assert_eq!(set.written_bytes(), 3 * PAGE_SIZE);
        assert!(set.read_bytes() >= PAGE_SIZE);

        let next = clone();
        set.fill(&next);
        assert_eq!(private_bytes(&next).unwrap(), 3 * PAGE_SIZE);
        // With a page that is read the host maps its neighbours (fault-around); which ones differs
        // from mapping to mapping.
        let again = WorkingSet::of(&next).unwrap();
        assert_eq!(again.written, set.written);
        let within = |part: &PageRange, whole: &PageRange| {
            whole.addr <= part.addr && part.addr + part.len <= whole.addr + whole.len
        };
        for part in &set.read {
            let mapped = again.read.iter().any(|whole| within(part, whole));
            assert!(mapped, "{part:?} of {set:?} is not in {again:?}");
        }
        for number in [3, 4, 20, 40] {
            // The template's content, not the first clone's.
            let seen = next.map().read_obj::<u8>(page(number)).unwrap();
            assert_eq!(u64::from(seen), number);
        }
    }

    #[test]
    fn what_lies_outside_memory_is_left_out() {
        let ram = GuestRam::new(4 * MIB).unwrap();
        let range = |addr, len| PageRange { addr, len };
        let set = WorkingSet {
            written: vec![
                range(4 * MIB, PAGE_SIZE),
                range(u64::MAX - 4095, PAGE_SIZE),
                range(0, u64::MAX),
                range(4 * MIB - PAGE_SIZE, 2 * PAGE_SIZE),
            ],
            read: vec![],
        };
        set.fill(&ram);
        assert_eq!(private_bytes(&ram).unwrap(), 0);
    }
}
