//! What a lease can do, and when the pool ends it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hearth_agent::AgentClient;
use hearth_agent::client::TreeLimits;
use hearth_agent::proto::{AGENT_PORT, Put};
use hearth_pool::kvm::GuestError;
use hearth_pool::{Backend, EventKind, Overdue, Parking, Pool, PoolEvent, Refill, VmId};
use hearth_tests::{kvm, noise, patience, within};
use hearth_vmm::virtio::vsock::ConnectError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast::Receiver;
use tokio::time::timeout;

use crate::rig::{BASE, Rig, builder, config, run, stop};

#[tokio::test]
async fn a_lease_has_streams_to_programs_of_its_guest() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).refill(Refill::AtStart)).await;
    let guest = pool.acquire(BASE).unwrap();
    let server = guest.command("vsock-echo").arg("3000");
    let mut server = guest.exec(server).await.unwrap();
    let mut line = [0; 10];
    let mut stdout = server.stdout().unwrap();
    let listening = stdout.read_exact(&mut line);
    within(5, "echo server", listening).await.unwrap();
    let mut stream = within(5, "connect", guest.connect(3000)).await.unwrap();
    stream.write_all(b"there and back").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut back = String::new();
    let echo = stream.read_to_string(&mut back);
    within(5, "echo", echo).await.unwrap();
    assert_eq!(back, "there and back");
    // No program listens on this port.
    assert!(within(6, "refusal", guest.connect(3001)).await.is_err());
    drop(guest);
    stop(pool).await;
}

#[tokio::test]
async fn a_tree_goes_from_one_lease_to_another() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2).refill(Refill::AtStart)).await;
    let (one, other) = (pool.acquire(BASE).unwrap(), pool.acquire(BASE).unwrap());
    let mut agent = one.agent().await.unwrap();
    let made = agent.make_dir("/srv/tree/inner", 0o755, true);
    within(5, "directory", made).await.unwrap();
    let content = noise(100_000, 3);
    let put = one.put(Put::new("/srv/tree/inner/file").mode(0o640), &content);
    within(5, "file", put).await.unwrap();
    let mut archive = Vec::new();
    let got = one.get_tree("/srv/tree", TreeLimits::default(), &mut archive);
    let got = within(10, "tree out", got).await.unwrap();
    assert_eq!((got.entries, got.bytes), (2, 100_000));
    let mut archive = archive.as_slice();
    let put = other.put_tree("/srv/copy", &mut archive);
    assert_eq!(within(10, "tree in", put).await.unwrap(), got);
    let back = other.get("/srv/copy/inner/file", 1 << 20);
    assert!(within(5, "file back", back).await.unwrap() == content);
    drop((one, other));
    stop(pool).await;
}

#[tokio::test]
async fn a_connection_to_a_guest_that_does_not_answer_fails_after_the_connect_timeout() {
    if !kvm() {
        return;
    }
    let mut config = config(1);
    config.boot.connect_timeout_ms = 300;
    let limit = patience(Duration::from_millis(300));
    let backend = builder(&config).await.build();
    let profile = &config.profiles[0];
    let guest = backend.create(profile, VmId(1)).await.unwrap();
    // The connection that it inherits from its template is already open.
    let mut kept = guest.agent().await.unwrap();
    within(6, "ping", kept.ping(1)).await.unwrap();
    guest.vm().pause().unwrap();
    let began = Instant::now();
    let late = within(1, "the connect timeout", guest.connect(3000)).await;
    assert!(
        matches!(late, Err(GuestError::Connect(ConnectError::TimedOut { waited, .. })) if waited == limit),
        "{late:?}"
    );
    assert!(began.elapsed() >= limit);
    let late = within(1, "the connect timeout", guest.agent()).await;
    assert!(
        matches!(
            late,
            Err(GuestError::Connect(ConnectError::TimedOut { .. }))
        ),
        "{late:?}"
    );
    guest.vm().resume().unwrap();
    within(6, "ping", kept.ping(2)).await.unwrap();

    // The guest's kernel accepts connections, but its agent is stopped and does not greet.
    let wedges = async {
        // The agent may be stopped before it reports that the program has started.
        let wedged = kept.exec(guest.command("wedge-agent")).await;
        std::future::pending::<()>().await;
        drop(wedged);
    };
    let silent = async {
        loop {
            if let Err(error) = guest.agent().await {
                return error;
            }
        }
    };
    let silent = async {
        tokio::select! {
            silent = silent => silent,
            () = wedges => unreachable!(),
        }
    };
    let silent = within(6, "a silent agent", silent).await;
    assert!(
        matches!(silent, GuestError::Silent(after) if after == limit),
        "{silent:?}"
    );
    backend.retire(guest).await;
}

/// It uses the one inherited from its template; the next programs open their own.
#[tokio::test]
async fn the_first_program_of_a_clone_needs_no_new_connection() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).refill(Refill::AtStart)).await;
    let guest = pool.acquire(BASE).unwrap();
    let victim = rig.vm(guest.id());
    let mut port = victim.port().await;
    for opened in [0, 1, 1] {
        let output = run(&guest, guest.command("echo").arg("hi")).await;
        assert_eq!(output.stdout, b"hi\n", "{opened}");
        let next = victim.port().await;
        assert_eq!(next - port - 1, opened);
        port = next;
    }
    drop(guest);
    stop(pool).await;
}

#[tokio::test]
async fn every_clone_has_a_boot_id_of_its_own() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(2).refill(Refill::AtStart)).await;
    let mut ids = Vec::new();
    for guest in pool.acquire_many(BASE, 2).unwrap() {
        let cat = guest.command("cat").arg("/proc/sys/kernel/random/boot_id");
        let id = String::from_utf8(run(&guest, cat).await.stdout).unwrap();
        let version = id.split('-').nth(2).and_then(|part| part.chars().next());
        assert_eq!((id.len(), version), (37, Some('4')), "{id}");
        ids.push(id);
    }
    assert_ne!(ids[0], ids[1]);
    stop(pool).await;
}

/// The guest's clock is set back an hour; the first program of the lease sees the right time.
#[tokio::test]
async fn the_first_request_sets_the_clock_before_its_program_runs() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).park(Parking::Running)).await;
    let victim = rig.all().pop().unwrap();
    let hour = Duration::from_secs(3600);
    victim.set_clock(SystemTime::now() - hour).await;
    let guest = pool.acquire(BASE).unwrap();
    let since_epoch = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let before = since_epoch();
    // Reads when the guest booted, by its clock, and how long ago that was.
    let words = ["/proc/stat", "/proc/uptime"];
    let output = run(&guest, guest.command("cat").args(words)).await;
    let took = since_epoch() - before;
    let text = String::from_utf8(output.stdout).unwrap();
    let booted = text.lines().find_map(|line| line.strip_prefix("btime "));
    let uptime = text.lines().last().and_then(|line| line.split(' ').next());
    let [booted, uptime] = [booted, uptime].map(|word| word.unwrap().parse::<f64>().unwrap());
    let off = booted + uptime - before.as_secs_f64();
    let slack = took.as_secs_f64() + 2.0;
    assert!(off.abs() <= slack, "its clock is {off} s off");
    drop(guest);
    stop(pool).await;
}

/// Starts a pool of two guests with the idle limit `idle` for leases.
async fn pool_with_idle_limit(rig: &Rig, idle: Duration) -> Pool<Rig> {
    let mut config = config(2).refill(Refill::AtStart);
    config.lease.idle_ms = idle.as_millis() as u64;
    rig.pool(config).await
}

/// Returns the next lease that the pool ends, and the reason.
async fn overdue(events: &mut Receiver<PoolEvent>) -> (Option<VmId>, Overdue) {
    loop {
        let event = events.recv().await.unwrap();
        if let EventKind::Overdue(why) = event.kind {
            return (event.vm, why);
        }
    }
}

#[tokio::test]
async fn a_lease_that_does_nothing_is_ended_and_one_that_works_is_not() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let idle = patience(Duration::from_millis(250));
    let pool = pool_with_idle_limit(&rig, idle).await;
    let mut events = pool.subscribe();
    let [lazy, busy] = pool.acquire_many(BASE, 2).unwrap().try_into().unwrap();
    let works = async {
        loop {
            within(6, "ping", busy.ping()).await.unwrap();
            tokio::time::sleep(idle / 10).await;
        }
    };
    let ended = within(6, "the idle limit", overdue(&mut events));
    let (vm, why) = tokio::select! {
        ended = ended => ended,
        () = works => unreachable!(),
    };
    assert_eq!((vm, why), (Some(lazy.id()), Overdue::Idle));
    within(5, "end", lazy.exited()).await;
    within(6, "ping", busy.ping()).await.unwrap();
    drop((lazy, busy));
    stop(pool).await;
}

/// Regression: a read that was given up counted for as long as its stream was open.
#[tokio::test]
async fn a_lease_whose_reader_has_given_up_is_idle_and_one_whose_reader_waits_is_not() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let idle = patience(Duration::from_millis(250));
    let pool = pool_with_idle_limit(&rig, idle).await;
    let mut events = pool.subscribe();
    let leases = pool.acquire_many(BASE, 2).unwrap();
    let mut lines = Vec::new();
    for guest in &leases {
        // The agent sends nothing more unless it gets a request.
        let mut line = within(5, "connect", guest.connect(AGENT_PORT))
            .await
            .unwrap();
        let greeting = AgentClient::handshake(&mut line);
        within(5, "handshake", greeting).await.unwrap();
        lines.push(line);
    }
    let [mut given_up, mut waits] = lines.try_into().unwrap();
    assert!(timeout(idle / 10, given_up.read_u8()).await.is_err());
    let waiting = timeout(idle * 6, waits.read_u8());
    let ended = within(6, "the idle limit", overdue(&mut events));
    let (ended, waiting) = tokio::join!(ended, waiting);
    assert_eq!(ended, (Some(leases[0].id()), Overdue::Idle));
    assert!(waiting.is_err(), "its guest was ended: {waiting:?}");
    drop((given_up, waits, leases));
    stop(pool).await;
}

/// The pool reports the private memory of each parked VM to a recorder.
#[tokio::test]
async fn a_fork_has_little_memory_of_its_own() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let pool = rig.pool(config(1).refill(Refill::AtStart)).await;
    let guest = pool.acquire(BASE).unwrap();
    let parked = rig.private_bytes(&guest).unwrap();
    assert!((64 << 10..16 << 20).contains(&parked), "{parked} bytes");
    run(&guest, guest.command("alloc").arg("1")).await;
    let used = guest.vm().private_bytes().unwrap();
    assert!(used >= parked + (1 << 20), "{parked}, then {used} bytes");
    eprintln!(
        "{} KiB when parked, {} KiB after use",
        parked >> 10,
        used >> 10
    );
    drop(guest);
    stop(pool).await;
}

#[tokio::test]
async fn a_lease_whose_program_is_silent_is_not_idle() {
    if !kvm() {
        return;
    }
    let rig = Rig::new().await;
    let idle = patience(Duration::from_millis(250));
    let pool = pool_with_idle_limit(&rig, idle).await;
    let mut events = pool.subscribe();
    let [waits, holds] = pool.acquire_many(BASE, 2).unwrap().try_into().unwrap();
    let silence = || format!("{}", (idle * 4).as_secs_f64().ceil());
    let held = holds.command("sleep").arg(silence());
    let held = holds.exec(held).await.unwrap();
    // A program that prints nothing for four idle limits, and then succeeds.
    run(&waits, waits.command("sleep").arg(silence())).await;
    while let Ok(event) = events.try_recv() {
        assert!(!matches!(event.kind, EventKind::Overdue(_)), "{event:?}");
    }
    // A request that was dropped is no activity.
    drop(held);
    let (_, why) = within(6, "the idle limit", overdue(&mut events)).await;
    assert_eq!(why, Overdue::Idle);
    drop((waits, holds));
    stop(pool).await;
}
