//! A pool that keeps microVMs warm, checks them and hands them out.
