//! The effects of a profile on its guests.

use std::collections::BTreeSet;
use std::sync::Arc;

use hearth_pool::{BootFailure, Pool, PoolConfig, Profile, StartError};
use hearth_tests::{kvm, within};

use crate::rig::{BASE, Rig, builder, config, run, stop};

fn changed(change: impl FnOnce(Profile) -> Profile) -> PoolConfig {
    let mut config = config(1);
    config.profiles[0] = change(config.profiles[0].clone());
    config
}

/// The template of this profile is stored, so that only the first run boots.
#[tokio::test]
async fn programs_have_the_environment_of_the_profile_as_far_as_they_do_not_say_otherwise() {
    if !kvm() {
        return;
    }
    let config = changed(|profile| profile.env("KEPT", "as it is").env("CHANGED", "before"));
    let rig = Rig::of(Arc::new(builder(&config).await.build()));
    let pool = rig.pool(config).await;
    let guest = pool.acquire(BASE).unwrap();
    let command = guest.command("env").env("CHANGED", "after").env("OWN", "1");
    let output = run(&guest, command).await;
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: BTreeSet<_> = text.lines().collect();
    for line in ["KEPT=as it is", "CHANGED=after", "OWN=1"] {
        assert!(lines.contains(line), "{text}");
    }
    assert!(!text.contains("before"), "{text}");
    drop(guest);
    stop(pool).await;
}

/// It fails like a boot: no template, no cold boot instead, nothing left behind.
#[tokio::test]
async fn a_warm_up_command_that_fails_fails_the_start_and_says_how() {
    if !kvm() {
        return;
    }
    let config = changed(|profile| profile.warm_up(["exit", "3"]));
    let rig = Rig::of(Arc::new(builder(&config).await.build()));
    let pool = Pool::new(rig.clone(), config).unwrap();
    let error = within(30, "start", pool.start()).await.unwrap_err();
    let StartError::NoVm(report) = error else {
        panic!("{error}")
    };
    let [failure] = &*report.profiles[0].failures else {
        panic!("{report:?}")
    };
    let BootFailure::Backend(why) = &failure.why else {
        panic!("{failure:?}")
    };
    assert!(why.to_string().contains("exit code 3"), "{why}");
    assert!(rig.all().is_empty());
    let status = pool.status();
    assert_eq!((status.usage.vms, status.leased), (0, 0));
    assert!(status.profiles[0].no_template.is_none(), "{status:?}");
}
