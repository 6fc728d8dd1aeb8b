use super::*;

#[test]
fn impossible_memory_is_refused_with_the_reason() {
    let with = |bytes| {
        VmConfig::builder("k")
            .memory_bytes(bytes)
            .build()
            .map(|_| ())
    };
    assert_eq!(with(0), Err(ConfigError::MemoryTooSmall(0)));
    assert_eq!(with(31 << 20), Err(ConfigError::MemoryTooSmall(31 << 20)));
    assert_eq!(
        with((64 << 20) + 1),
        Err(ConfigError::MemoryNotWhole((64 << 20) + 1))
    );
    assert!(matches!(
        with(1 << 60),
        Err(ConfigError::MemoryTooLarge { .. })
    ));
    assert!(matches!(
        VmConfig::builder("k").memory_mib(u64::MAX).build(),
        Err(ConfigError::MemoryTooLarge { .. } | ConfigError::MemoryNotWhole(_))
    ));
    assert_eq!(with(32 << 20), Ok(()));
}

#[test]
fn memory_of_reserved_pages_is_whole_pages_of_2_mib() {
    let with = |mib, pages| VmConfig::builder("k").memory_mib(mib).huge_pages(pages);
    let refused = with(33, HugePages::Reserved).build().unwrap_err();
    assert_eq!(refused, ConfigError::MemoryNotHuge(33 << 20));
    assert!(with(34, HugePages::Reserved).build().is_ok());
    assert!(with(33, HugePages::Transparent).build().is_ok());
}

#[test]
fn impossible_vcpus_are_refused() {
    for (vcpus, ok) in [(0, false), (1, true), (32, true), (33, false), (255, false)] {
        assert_eq!(
            VmConfig::builder("k").vcpus(vcpus).build().is_ok(),
            ok,
            "{vcpus}"
        );
    }
}

#[test]
fn a_quota_is_at_least_a_percent_and_at_most_all_vcpus() {
    let with = |vcpus, percent| {
        let config = VmConfig::builder("k").vcpus(vcpus).cpu_quota(percent);
        config.build().is_ok()
    };
    assert!(with(1, 1) && with(1, 100) && with(4, 400));
    assert!(!with(1, 0) && !with(1, 101) && !with(4, 401) && !with(1, u32::MAX));
}

#[test]
fn more_images_than_interrupt_lines_are_refused() {
    let with = |count| {
        let config = VmConfig::builder("k");
        (0..count)
            .fold(config, |config, _| config.pmem("i"))
            .build()
    };
    assert!(with(MAX_IMAGES).is_ok());
    assert_eq!(with(9).err(), Some(ConfigError::Images(9)));
}

#[test]
fn the_native_profile_adds_no_emulation_words() {
    let config = VmConfig::builder("k").append("a  b=c").build().unwrap();
    let native = config.cmdline(CpuProfile::Native, &["dev".into()]);
    assert!(
        !native
            .iter()
            .any(|w| w.contains("emulated") || w.contains("clearcpuid"))
    );
    assert_eq!(native[native.len() - 3..], ["dev", "a", "b=c"]);
    let emulated = config.cmdline(CpuProfile::Emulated, &[]);
    assert!(emulated.contains(&"hearth.emulated".to_owned()));
    let plain = VmConfig::builder("k")
        .plain_cmdline()
        .append("x")
        .build()
        .unwrap();
    assert_eq!(
        plain.cmdline(CpuProfile::Emulated, &["dev".into()]),
        ["dev", "x"]
    );
}

#[test]
fn a_guest_with_memory_above_4_gib_keeps_no_bounce_buffers() {
    let has = |bytes| {
        let config = VmConfig::builder("k").memory_bytes(bytes).0;
        let words = config.cmdline(CpuProfile::Native, &[]);
        words.contains(&"swiotlb=noforce".to_owned())
    };
    assert!(!has(GAP_START) && has(GAP_START + (1 << 20)));
}
