//! vmm-bench: boot, fork and hand-off measured beside peers.
