//! The virtio socket device (virtio 1.2 section 5.10).
