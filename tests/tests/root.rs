#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! A root file system of the user's: programs of this machine, linked dynamically, in a guest.

use std::path::Path;
use std::process::Command as HostCommand;

use hearth_agent::client::{Command, ExecError, FileError};
use hearth_agent::proto::{ExitStatus, FileFailure, Put, ROOT_WORD, SpawnFailure, layer_word};
use hearth_images::import;
use hearth_tests::{Guest, kvm, not_measured, within};

/// Copies this machine's shell with the libraries that it is linked to.
fn shell_tree(tree: &Path) -> Option<()> {
    let said = HostCommand::new("ldd").arg("/bin/sh").output().ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    let libraries = said.split_whitespace().filter(|word| word.starts_with('/'));
    for file in libraries.chain(["/bin/sh"]) {
        let to = tree.join(file.trim_start_matches('/'));
        std::fs::create_dir_all(to.parent()?).ok()?;
        std::fs::copy(file, to).ok()?;
    }
    std::fs::create_dir_all(tree.join("etc")).ok()?;
    std::fs::write(tree.join("etc/motto"), "from the image\n").ok()
}

fn sh(script: &str) -> Command {
    Command::new("sh").args(["-c", script])
}

#[tokio::test]
async fn a_guest_runs_programs_of_its_root_and_writes_beside_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    if shell_tree(&tree).is_none() {
        return not_measured("no shell with libraries to copy");
    }
    if let Err(error) = import(&tree, &image) {
        return not_measured(&hearth_tests::error_chain(&error));
    }
    let before = std::fs::read(&image).unwrap();
    let guest = Guest::prepared(|config| {
        let config = config.pmem(&image).append(ROOT_WORD);
        config.append(&layer_word(1))
    })
    .await;
    let script = "read -r line < /etc/motto; echo \"$line $((6 * 7))\"; echo mine > /etc/motto";
    let output = guest.run(sh(script)).await;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert_eq!(text(&output.stderr), "");
    assert_eq!(text(&output.stdout), "from the image 42\n");
    assert_eq!(output.status, ExitStatus::Code(0));
    // What was written is there for the next program, in its template's clones, and not in the image.
    let output = guest.run(Command::new("cat").arg("/etc/motto")).await;
    assert_eq!(text(&output.stdout), "mine\n");
    // In place: a page of the image takes none of the guest's memory.
    let mounts = guest.run(Command::new("cat").arg("/proc/mounts")).await;
    let mounts = text(&mounts.stdout);
    assert!(mounts.contains("overlay / overlay"), "{mounts}");
    // Files take as much of it as was said.
    let big = Put::new("/big");
    let refused = guest.connect().await.put(big, &vec![1; 2 << 20]).await;
    let error = refused.unwrap_err();
    let FileError::Failed { failure, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*failure, FileFailure::Full);
    let template = guest.freeze();
    let mut clones = [Guest::of(&template).await, Guest::of(&template).await];
    let [one, other] = &mut clones;
    let put = one.agent.put(Put::new("/etc/motto"), b"one's\n");
    within(5, "put", put).await.unwrap();
    for (clone, motto) in [(one, "one's\n"), (other, "mine\n")] {
        let output = clone
            .run(sh("read -r line < /etc/motto; echo \"$line\""))
            .await;
        assert_eq!(text(&output.stdout), motto);
    }
    assert!(std::fs::read(&image).unwrap() == before);
}

#[tokio::test]
async fn a_root_that_is_no_file_system_is_said_when_a_program_is_to_run() {
    if !kvm() {
        return;
    }
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(2 << 20).unwrap();
    let guest = Guest::prepared(|config| config.pmem(image.path()).append(ROOT_WORD)).await;
    let refused = guest.connect().await.exec(Command::new("true")).await;
    let error = refused.unwrap_err();
    assert!(
        matches!(error, ExecError::Failed(SpawnFailure::NoRoot { errno: 22 })),
        "{error}"
    );
    assert!(error.to_string().contains("EROFS"), "{error}");
}
