//! Runs the commands of a recipe as root of the tree.

use super::tree_root::TreeRoot;
use super::{RootError, confine};
use crate::cache::io_error;
use crate::command;

/// Fails if there are commands and this machine cannot run any. Called before anything is fetched.
pub(super) fn check(commands: &[String]) -> Result<(), RootError> {
    let wanted = (!commands.is_empty()).then(confine::refused);
    match wanted.flatten() {
        Some(refused) => Err(RootError::NoNamespaces(refused)),
        None => Ok(()),
    }
}

pub(super) fn run(tree: &TreeRoot, commands: &[String]) -> Result<(), RootError> {
    for text in commands {
        let shell = confine::command(tree, "/bin/sh");
        let mut shell = shell.map_err(io_error("open", tree.path()))?;
        let said = |line: &str| tracing::info!(command = text, "{line}");
        command::run(shell.arg("-c").arg(text), said).map_err(|source| {
            let command = text.clone();
            RootError::Command { command, source }
        })?;
    }
    Ok(())
}
