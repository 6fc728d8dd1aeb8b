//! The guest side of Hearth: wire protocol, host client, and PID 1.
