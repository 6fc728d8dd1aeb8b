//! Builds the guest kernel, initramfs and root file systems that Hearth boots.
