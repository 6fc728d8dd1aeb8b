#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
//! A root file system from an image: dynamically linked programs of this machine in a guest.

use hearth_agent::client::{Command, ExecError, FileError};
use hearth_agent::proto::{
    ExitStatus, FileFailure, Put, ROOT_WORD, SpawnFailure, WindowSize, layer_word,
};
use hearth_tests::{Guest, kvm, shell_root, within};

fn sh(script: &str) -> Command {
    Command::new("sh").args(["-c", script])
}

#[tokio::test]
async fn a_guest_runs_programs_of_its_root_and_writes_beside_it() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let passwd = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n";
    let files = [("etc/motto", "from the image\n"), ("etc/passwd", passwd)];
    let Some(image) = shell_root(dir.path(), &[], &files) else {
        return;
    };
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
    // The next program sees what was written, and so do clones of a template of this guest; the
    // image does not change.
    let output = guest.run(Command::new("cat").arg("/etc/motto")).await;
    assert_eq!(text(&output.stdout), "mine\n");
    // The root is mounted in place: a page of the image takes none of the guest's memory.
    let mounts = guest.run(Command::new("cat").arg("/proc/mounts")).await;
    let mounts = text(&mounts.stdout);
    assert!(mounts.contains("overlay / overlay"), "{mounts}");
    // The image's user has a home of its own, although all files in an image belong to root.
    let script = "echo $USER $HOME; pwd; echo mine > file; read -r line < file; echo $line";
    let output = guest.run(sh(script).usual_user()).await;
    let expected = "user /home/user\n/home/user\nmine\n";
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    for (command, expected) in [
        (Command::new("id").usual_user(), "uid=1000 gid=1000 "),
        (Command::new("id").user_name("root"), "uid=0 gid=0 "),
        (Command::new("id"), "uid=0 gid=0 "),
    ] {
        let output = guest.run(command).await;
        assert!(text(&output.stdout).starts_with(expected), "{output:?}");
    }
    // A terminal works whatever the image has in /dev.
    let script = "[ -t 0 ] && read -r line && echo \"<$line>\" && echo direct > /dev/tty";
    let terminal = sh(script).terminal(WindowSize::default());
    let output = guest.run_with(terminal, b"typed\n").await;
    assert_eq!(output.status, ExitStatus::Code(0));
    let shown = text(&output.stdout);
    assert!(shown.ends_with("<typed>\r\ndirect\r\n"), "{shown:?}");
    // Written files take no more memory than the configured limit.
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

/// Returns the KiB of the guest's memory that hold copies of files.
async fn cached(guest: &Guest) -> u64 {
    let output = guest.run(Command::new("cat").arg("/proc/meminfo")).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Cached:"));
    let word = line.and_then(|line| line.split_whitespace().next());
    word.unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_file_of_the_root_that_is_read_takes_none_of_the_guests_memory() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // The end of the file does not fill a block: a file that is not mapped is copied as a whole.
    let content = "x".repeat((8 << 20) + 100);
    let Some(image) = shell_root(dir.path(), &["/bin/cat"], &[("big", &content)]) else {
        return;
    };
    let guest = Guest::prepared(|config| config.pmem(&image).append(ROOT_WORD)).await;
    // The first program brings in the pages that every program needs.
    cached(&guest).await;
    // A copy of the file shows that such memory is counted here. The kernel counts per processor,
    // so it is off by some pages.
    for (to, least, most) in [("/dev/null", 0, 256), ("/tmp/copy", 7680, 9216)] {
        let before = cached(&guest).await;
        let output = guest.run(sh(&format!("cat /big > {to}"))).await;
        assert_eq!(output.status, ExitStatus::Code(0));
        let grown = cached(&guest).await.saturating_sub(before);
        assert!((least..=most).contains(&grown), "{to}: {grown} KiB");
    }
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
