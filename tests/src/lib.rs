//! Integration tests of Hearth on real guests.
