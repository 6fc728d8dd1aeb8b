//! Where templates come from, and what they contain.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth_images::{Images, Silent};
use hearth_pool::kvm::{Guest, KvmBackend, KvmImage, Source};
use hearth_pool::{Backend, Balloon, Parking, PoolConfig, VmId};
use hearth_tests::{alone, error_chain, kvm, not_measured, patience, within};

use crate::rig::{BASE, Rig, alone_in_a_runtime, builder, config, run, stop};

async fn prepared(backend: &KvmBackend, config: &PoolConfig) -> Duration {
    let begin = Instant::now();
    backend.prepare(&config.profiles[0]).await.unwrap();
    begin.elapsed()
}

async fn is_healthy(backend: &KvmBackend, config: &PoolConfig) -> Guest {
    let guest = backend.create(&config.profiles[0], VmId(1)).await.unwrap();
    within(6, "probe", backend.probe(&guest)).await.unwrap();
    guest
}

/// Many test processes need this template; one of them boots it and stores it.
#[tokio::test]
async fn a_template_that_another_process_has_stored_is_found() {
    if !kvm() {
        return;
    }
    let config = config(1);
    // Stores the template unless it is stored already.
    drop(Rig::new().await);
    let backend = builder(&config).await.build();
    let took = prepared(&backend, &config).await;
    // A boot takes longer than this on any host; on a loaded host so does this, hence `patience`.
    assert!(took < patience(Duration::from_millis(500)), "{took:?}");
    backend.retire(is_healthy(&backend, &config).await).await;
}

#[tokio::test]
#[ignore = "long: four boots"]
async fn a_stored_template_is_found_a_broken_one_made_again_and_no_cache_is_no_error() {
    if !kvm() {
        return;
    }
    let (dir, config) = (tempfile::tempdir().unwrap(), config(1));
    let root = dir.path().join("templates");
    let backend = async |root: &Path| {
        let builder = builder(&config).await;
        builder.template_cache(root, 1 << 30).build()
    };
    let booted = prepared(&backend(&root).await, &config).await;
    let entries = || {
        let entries = fs::read_dir(&root)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let entries = entries.filter(|path| path.join("manifest").exists());
        entries.collect::<Vec<_>>()
    };
    let [entry] = entries().try_into().unwrap();
    let second = backend(&root).await;
    let found = prepared(&second, &config).await;
    assert!(found < booted / 2, "{booted:?} booted, {found:?} found");
    second.retire(is_healthy(&second, &config).await).await;
    drop(second);

    let memory = OpenOptions::new().write(true).open(entry.join("memory"));
    memory.unwrap().set_len(1 << 20).unwrap();
    let third = backend(&root).await;
    prepared(&third, &config).await;
    third.retire(is_healthy(&third, &config).await).await;
    assert_eq!(entries(), std::slice::from_ref(&entry));
    drop(third);
    let found = prepared(&backend(&root).await, &config).await;
    assert!(found < booted / 2, "{booted:?} booted, {found:?} found");

    // A profile with another environment has another entry.
    let mut other = config.clone();
    other.profiles[0] = other.profiles[0].clone().env("A", "1");
    prepared(&backend(&root).await, &other).await;
    assert_eq!(entries().len(), 2);

    // The cache cannot be created: a file is in the way, and not even root can write into that.
    fs::write(dir.path().join("file"), "").unwrap();
    let nowhere = backend(&dir.path().join("file")).await;
    prepared(&nowhere, &config).await;
    nowhere.retire(is_healthy(&nowhere, &config).await).await;
}

/// The program is frozen in the template, and in a clone until that is unique.
#[tokio::test]
async fn what_the_warm_up_left_running_goes_on_in_each_clone() {
    if !kvm() {
        return;
    }
    let mut config = config(1);
    let profile = config.profiles[0].clone();
    config.profiles[0] = profile.warm_up(["background", "sleep", "100000"]);
    let backend = builder(&config).await.no_template_cache().build();
    prepared(&backend, &config).await;
    for _ in 0..2 {
        let guest = is_healthy(&backend, &config).await;
        let events = guest
            .command("cat")
            .arg("/sys/fs/cgroup/exec-0/cgroup.events");
        let events = run(&guest, events).await;
        assert_eq!(
            String::from_utf8_lossy(&events.stdout),
            "populated 1\nfrozen 0\n"
        );
        backend.retire(guest).await;
    }
}

/// Returns a backend whose guests have the root file system `root`, with its templates in `cache`.
async fn rooted(config: &PoolConfig, root: &Path, cache: &Path) -> KvmBackend {
    let base = tokio::task::spawn_blocking(|| Images::open(None)?.base(&Silent));
    let base = base.await.unwrap().expect("the base image");
    let image = KvmImage::new(base.kernel, base.initramfs).root(root);
    let builder = KvmBackend::builder(config).unwrap();
    builder
        .image(BASE, image)
        .template_cache(cache, 1 << 30)
        .build()
}

#[tokio::test]
async fn guests_with_a_root_of_their_own_are_forked_from_a_template_that_is_found_with_it() {
    if !kvm() {
        return;
    }
    let (dir, config) = (tempfile::tempdir().unwrap(), config(1));
    let (root, cache) = (dir.path().join("root"), dir.path().join("templates"));
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("motto"), "of the root\n").unwrap();
    if let Err(error) = hearth_images::import(tree.path(), &root) {
        return not_measured(&error_chain(&error));
    }
    let first = rooted(&config, &root, &cache).await;
    let booted = prepared(&first, &config).await;
    drop(first);
    let second = rooted(&config, &root, &cache).await;
    let found = prepared(&second, &config).await;
    assert!(found < booted / 2, "{booted:?} booted, {found:?} found");
    let guest = is_healthy(&second, &config).await;
    let output = run(&guest, guest.command("cat").arg("/motto")).await;
    assert_eq!(output.stdout, b"of the root\n");
    second.retire(guest).await;
}

/// The memory of all guests and templates of this process in KiB, by inode.
fn memory_files() -> BTreeMap<u64, u64> {
    let fds = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let memory = fds.filter_map(|fd| {
        let name = fs::read_link(fd.path()).ok()?;
        if !name.to_string_lossy().contains("memfd:hearth-guest") {
            return None;
        }
        let file = fs::metadata(fd.path()).ok()?;
        Some((file.ino(), file.blocks() / 2))
    });
    memory.collect()
}

async fn squeezed() {
    let config = |balloon| {
        let mut config = config(1);
        let profile = config.profiles[0].clone().warm_up(["alloc", "12"]);
        config.profiles[0] = profile.balloon(balloon);
        config
    };
    let mut sizes = vec![];
    for balloon in [Balloon::Off, Balloon::Auto] {
        let config = config(balloon);
        let backend = builder(&config).await.no_template_cache().build();
        let took = prepared(&backend, &config).await;
        let [size] = memory_files()
            .into_values()
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        let guest = is_healthy(&backend, &config).await;
        let own = backend.private_bytes(&guest).unwrap() >> 10;
        eprintln!("{balloon:?}: made in {took:?}, holds {size} KiB, {own} KiB of each fork");
        // The guest has all of its memory at once.
        assert_eq!(guest.vm().balloon().actual(), 0);
        let mut agent = guest.agent().await.unwrap();
        let memory = agent.ping(1).await.unwrap().memory;
        let in_use = (memory.total_bytes - memory.free_bytes) >> 20;
        assert!(in_use < 24, "{in_use} MiB in use");
        assert!(
            run(&guest, guest.command("alloc").arg("2"))
                .await
                .status
                .success()
        );
        backend.retire(guest).await;
        sizes.push(size);
    }
    // The balloon gave back at least 8 of the 12 MiB that the command freed.
    assert!(
        sizes[1] + (8 << 10) <= sizes[0].max(20 << 10),
        "{sizes:?} KiB"
    );
}

#[test]
#[ignore = "long: inflates and deflates a balloon where ring 0 is emulated"]
fn a_template_does_not_hold_what_its_warm_up_let_go_of() {
    if kvm() && alone() {
        alone_in_a_runtime(squeezed());
    }
}

/// Without a template, every VM boots, is inflated to its idle target, and deflates under its
/// owner.
#[tokio::test]
#[ignore = "long: a cold boot, and a balloon where ring 0 is emulated"]
async fn a_guest_booted_cold_is_small_while_parked_and_whole_when_used() {
    if !kvm() {
        return;
    }
    let mut config = config(1).park(Parking::Paused);
    config.profiles[0].memory_mib = 96;
    let spare = 96 - config.balloon.idle_target_mib;
    let backend = builder(&config).await.source(Source::Boot).build();
    let rig = Rig::of(Arc::new(backend));
    let pool = rig.pool(config).await;
    let victim = rig.all().pop().unwrap();
    // Inflation has a time limit: it came within 20 MiB of the target, and the rest is not waited
    // for.
    let inflated = victim.balloon.actual();
    assert!(
        inflated + 20 >= spare && inflated <= spare,
        "{inflated} of {spare} MiB"
    );
    let begin = Instant::now();
    let guest = pool.acquire(BASE).unwrap();
    let took = begin.elapsed();
    assert!(took < Duration::from_millis(50), "acquire waited {took:?}");
    within(6, "ping", guest.ping()).await.unwrap();
    let deflated = async {
        while victim.balloon.actual() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(10, "deflation", deflated).await;
    let free = guest
        .agent()
        .await
        .unwrap()
        .ping(1)
        .await
        .unwrap()
        .memory
        .free_bytes
        >> 20;
    assert!(free + 20 >= 96 - 16, "{free} MiB free");
    drop(guest);
    stop(pool).await;
}

#[test]
fn a_start_that_waits_for_another_processs_template_can_be_given_up_and_its_runtime_ends() {
    if !kvm() {
        return;
    }
    let (dir, config) = (tempfile::tempdir().unwrap(), config(1));
    let cache = dir.path().join("templates");
    let backend = async || {
        let builder = builder(&config).await;
        builder.template_cache(&cache, 1 << 30).build()
    };
    alone_in_a_runtime(async {
        prepared(&backend().await, &config).await;
    });
    // Simulates another process that makes the entry.
    let lock = fs::read_dir(cache.join("lock")).unwrap().flatten().next();
    let lock = lock.unwrap();
    fs::remove_dir_all(cache.join(lock.file_name())).unwrap();
    let other = fs::File::open(lock.path()).unwrap();
    other.lock().unwrap();
    std::thread::scope(|scope| {
        let (over, ended) = std::sync::mpsc::channel();
        scope.spawn(|| {
            let over = over;
            alone_in_a_runtime(async {
                let backend = backend().await;
                let prepare = backend.prepare(&config.profiles[0]);
                let waited = tokio::time::timeout(Duration::from_secs(1), prepare).await;
                assert!(waited.is_err(), "{waited:?}");
            });
            over.send(()).unwrap();
        });
        let ended = ended.recv_timeout(patience(Duration::from_secs(10)));
        // Lets a thread that still waits continue, so that the test ends.
        other.unlock().unwrap();
        assert!(ended.is_ok(), "the runtime does not end");
    });
    alone_in_a_runtime(async {
        prepared(&backend().await, &config).await;
    });
    assert!(cache.join(lock.file_name()).is_dir());
}
