//! What would wake an idle guest time and again for nothing. A parked guest should cost its host
//! nothing, and a clone should not begin with what its template had put off, or hold what it let go
//! of.

use crate::kept::Kept;

/// Settings of the kernel (Documentation/admin-guide/sysctl/vm.rst).
const SETTINGS: [(&str, &[u8]); 3] = [
    // Looks twice a second whether memory is fragmented, to compact it ahead of need.
    ("/proc/sys/vm/compaction_proactiveness", b"0\n"),
    // Adds up statistics each second. What is decided by them is decided by exact ones near a
    // limit.
    ("/proc/sys/vm/stat_interval", b"60\n"),
    // Freed memory is free, and can be given to the host. Processors keep up to an eighth of all
    // to themselves, until the statistics are added up; now a 64th.
    ("/proc/sys/vm/percpu_pagelist_high_fraction", b"64\n"),
];

/// Sets them; a kernel without one of them has nothing to be stopped.
pub(crate) fn settle() {
    for (path, value) in SETTINGS {
        let _ = Kept::of_kernel(path).put(value);
    }
}
