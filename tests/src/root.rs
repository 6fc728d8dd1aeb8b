//! Root file systems for guests, made of programs of this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use hearth_agent::proto::ROOT_WORD;
use hearth_vmm::Template;
use tokio::sync::OnceCell;

use crate::guest::{Guest, error_chain};
use crate::skip::{kvm, not_measured};

/// Memory of guests with a shell: little, so that a program can soon use it up.
const MEMORY_MIB: u64 = 40;

/// Makes an image in `dir` with this machine's `/bin/sh`, the other `programs` (absolute paths),
/// the libraries that they are linked to, and these `files`. Where that is not possible, reports
/// the test as skipped and returns `None`.
#[must_use]
#[track_caller]
pub fn shell_root(dir: &Path, programs: &[&str], files: &[(&str, &str)]) -> Option<PathBuf> {
    let (tree, image) = (dir.join("tree"), dir.join("image"));
    for program in programs.iter().chain(&["/bin/sh"]) {
        if add_program(&tree, program).is_none() {
            not_measured(&format!("no {program} with libraries to copy"));
            return None;
        }
    }
    for (name, content) in files {
        add_file(&tree, name, content);
    }
    match hearth_images::import(&tree, &image) {
        Ok(_) => Some(image),
        Err(error) => {
            not_measured(&error_chain(&error));
            None
        }
    }
}

/// Returns a guest for one case, with a shell, `cat` and `mkfifo`: a clone of a guest that is
/// booted once per test binary. Where that is not possible, reports the test as skipped and returns
/// `None`.
///
/// # Panics
/// As [`Guest::prepared`].
pub async fn shell_guest() -> Option<Guest> {
    static TEMPLATE: OnceCell<Option<(Template, tempfile::TempDir)>> = OnceCell::const_new();
    if !kvm() {
        return None;
    }
    let make = || async {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let image = shell_root(dir.path(), &["/bin/cat", "/usr/bin/mkfifo"], &[])?;
        let guest = Guest::prepared(|config| {
            let config = config.pmem(&image).append(ROOT_WORD);
            config.memory_mib(MEMORY_MIB)
        });
        Some((guest.await.freeze(), dir))
    };
    let (template, _) = TEMPLATE.get_or_init(make).await.as_ref()?;
    Some(Guest::of(template).await)
}

fn add_program(tree: &Path, program: &str) -> Option<()> {
    let said = Command::new("ldd").arg(program).output().ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    let libraries = said.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain([program]) {
        let to = tree.join(file.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent()?).ok()?;
        std::fs::copy(file, to).ok()?;
    }
    Some(())
}

fn add_file(tree: &Path, name: &str, content: &str) {
    let place = tree.join(name);
    let dir = place.parent().unwrap_or(tree);
    let added = std::fs::create_dir_all(dir).and_then(|()| std::fs::write(&place, content));
    added.unwrap_or_else(|error| panic!("{}: {error}", place.display()));
}
