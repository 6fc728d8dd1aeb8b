//! Turns off kernel work that would wake an idle guest repeatedly. A parked guest should cost its
//! host nothing, and a clone should not begin with work that its template had deferred, or hold
//! memory that its template had freed.

use crate::kept::Kept;

/// Kernel settings (Documentation/admin-guide/sysctl/vm.rst).
const SETTINGS: [(&str, &[u8]); 3] = [
    // Checks twice a second whether memory is fragmented, to compact it in advance.
    ("/proc/sys/vm/compaction_proactiveness", b"0\n"),
    // Interval at which statistics are summed, by default each second. Near a limit, decisions use
    // exact values instead.
    ("/proc/sys/vm/stat_interval", b"60\n"),
    // Frees memory for good sooner, so that it can be given back to the host. By default, per-CPU
    // lists hold up to an eighth of all memory until the statistics are summed; now a 64th.
    ("/proc/sys/vm/percpu_pagelist_high_fraction", b"64\n"),
];

/// Applies the settings; a kernel without one of them does not do that work.
pub(crate) fn settle() {
    for (path, value) in SETTINGS {
        let _ = Kept::of_kernel(path).put(value);
    }
}
