//! Attacks on the registers.

use super::*;

/// Each attack is listed with part of the text of the fault that must catch it.
#[test]
fn registers_written_as_no_driver_may_need_a_reset() {
    type Attack = fn(&mut Attacker);
    let attacks: &[(&str, Attack, &str)] = &[
        (
            "a register of one byte",
            |a| a.transport.write(register::STATUS, &[1]),
            "32 bits wide",
        ),
        (
            "a register of two bytes",
            |a| a.transport.write(register::QUEUE_SEL, &[1, 0]),
            "32 bits wide",
        ),
        (
            "a register of eight bytes",
            |a| a.transport.write(register::QUEUE_DESC_LOW, &[0; 8]),
            "32 bits wide",
        ),
        (
            "a register askew",
            |a| a.transport.write(register::STATUS + 2, &[0; 4]),
            "32 bits wide",
        ),
        (
            "the last bytes before the configuration",
            |a| a.transport.write(register::CONFIG - 1, &[0; 4]),
            "32 bits wide",
        ),
        (
            "a status bit that does not exist",
            |a| a.set(register::STATUS, UP & !status::DRIVER_OK | 0x100),
            "out of order",
        ),
        (
            "a status that goes backwards",
            |a| a.set(register::STATUS, status::ACKNOWLEDGE),
            "was cleared",
        ),
        (
            "features changed after they were settled",
            |a| a.set(register::DRIVER_FEATURES, 0),
            "outside negotiation",
        ),
        (
            "a queue of 65536 entries",
            |a| a.set(register::QUEUE_NUM, 0x1_0000),
            "larger than 65535",
        ),
        (
            "a queue changed after it was ready",
            |a| {
                a.queue(0, SIZE.into(), parts(0));
                a.set(register::QUEUE_DESC_LOW, 0);
            },
            "a ready queue was changed",
        ),
        (
            "a queue moved while it is served",
            |a| {
                a.up(F_VERSION_1, a.queues);
                a.set(register::QUEUE_DRIVER_LOW, 0x8000);
            },
            "outside its phase",
        ),
        (
            "a queue before the features",
            |a| {
                a.set(register::STATUS, 0);
                a.set(register::QUEUE_NUM, 16);
            },
            "outside its phase",
        ),
        ("a start without queues", Attacker::start, "queue"),
    ];
    for (attack, act, why) in attacks {
        for (name, mut attacker) in Attacker::each() {
            attacker.negotiate(F_VERSION_1);
            act(&mut attacker);
            assert_eq!(attacker.transport.faults(), 1, "{name}: {attack}");
            attacker.assert_refused(&format!("{name}: {attack}"), why);
        }
    }
}

#[test]
fn queues_that_cannot_be_are_refused_at_the_start() {
    let [desc, driver, device] = parts(0);
    let outside = "outside guest memory";
    for (attack, size, parts, why) in [
        ("no entries", 0, parts(0), "size"),
        ("not a power of two", 24, parts(0), "size"),
        ("more entries than the device allows", 256, parts(0), "size"),
        ("descriptors askew", 8, [desc + 8, driver, device], "align"),
        ("driver ring askew", 8, [desc, driver + 1, device], "align"),
        ("device ring askew", 8, [desc, driver, device + 2], "align"),
        (
            "descriptors that wrap around 2^64",
            8,
            [u64::MAX - 15, driver, device],
            outside,
        ),
        (
            "driver ring that wraps around 2^64",
            8,
            [desc, u64::MAX - 1, device],
            outside,
        ),
        (
            "device ring that wraps around 2^64",
            8,
            [desc, driver, u64::MAX - 3],
            outside,
        ),
        (
            "a ring over the end of memory",
            8,
            [desc, RAM - 8, device],
            outside,
        ),
        ("a ring in the image", 8, [desc, driver, GAP_END], outside),
    ] {
        for (name, mut attacker) in Attacker::each() {
            let attack = format!("{name}: {attack}");
            attacker.negotiate(F_VERSION_1);
            for other in 1..attacker.queues {
                attacker.queue(other, SIZE.into(), super::parts(other));
            }
            attacker.queue(0, size, parts);
            attacker.start();
            attacker.assert_refused(&attack, why);
        }
    }
}

/// Feature bits beyond 63 are not stored: otherwise FEATURES_OK would be refused below, as it is
/// for unknown bits below 64.
#[test]
fn a_feature_selector_out_of_range_selects_nothing() {
    for (name, mut attacker) in Attacker::each() {
        for (selector, accepted) in [(2, true), (u32::MAX, true), (0, false), (1, false)] {
            attacker.set(register::STATUS, 0);
            attacker.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
            attacker.set(register::DRIVER_FEATURES_SEL, 1);
            attacker.set(register::DRIVER_FEATURES, 1);
            attacker.set(register::DRIVER_FEATURES_SEL, selector);
            attacker.set(register::DRIVER_FEATURES, u32::MAX);
            attacker.set(register::STATUS, UP & !status::DRIVER_OK);
            let taken = attacker.transport.status() & status::FEATURES_OK != 0;
            assert_eq!(taken, accepted, "{name}: {selector}");
            attacker.set(register::DEVICE_FEATURES_SEL, selector);
            let offered = attacker.get(register::DEVICE_FEATURES);
            assert_eq!(offered == 0, accepted, "{name}: {selector}");
        }
        attacker.up(F_VERSION_1, attacker.queues);
        attacker.assert_unaffected(name);
    }
}

#[test]
fn a_queue_selector_out_of_range_selects_nothing() {
    for (name, mut attacker) in Attacker::each() {
        attacker.negotiate(F_VERSION_1);
        for index in [4, 5, 0xffff, 0x1_0000, u32::MAX] {
            attacker.queue(index, 16, [1, 1, 1]);
            assert_eq!(attacker.get(register::QUEUE_NUM_MAX), 0, "{name}: {index}");
            assert_eq!(attacker.get(register::QUEUE_READY), 0, "{name}: {index}");
        }
        attacker.up(F_VERSION_1, attacker.queues);
        attacker.assert_unaffected(name);
    }
}

#[test]
fn a_faulty_device_can_be_started_and_still_serves_nothing() {
    for (name, mut attacker) in Attacker::each() {
        attacker.negotiate(F_VERSION_1);
        for index in 0..attacker.queues {
            attacker.forget(index);
            attacker.queue(index, SIZE.into(), parts(index));
        }
        attacker.transport.write(register::STATUS, &[1]);
        attacker.start();
        assert_eq!(attacker.transport.status(), UP | status::NEEDS_RESET);
        let last = attacker.queues - 1;
        attacker.descriptor(last, 0, (BUFFER, 4), 0, 0);
        attacker.offer(last, 0);
        attacker.run();
        assert_eq!(attacker.used(last), 0, "{name}");
        assert!(!attacker.transport.active(), "{name}");
        attacker.assert_serves(name);
    }
}

#[test]
fn notifications_in_every_state_do_nothing_before_the_start() {
    for (name, mut attacker) in Attacker::each() {
        let states = [0, 1, 3, 11, 11 | status::FAILED];
        for (count, state) in states.into_iter().enumerate() {
            attacker.set(register::STATUS, state);
            if state == 3 {
                attacker.set(register::DRIVER_FEATURES_SEL, 1);
                attacker.set(register::DRIVER_FEATURES, 1);
            }
            assert_eq!(attacker.transport.status(), state, "{name}: step {count}");
            for queue in [0, 1, 7, u32::MAX] {
                attacker.offer(queue % 4, 0);
                attacker.set(register::QUEUE_NOTIFY, queue);
                assert!(attacker.transport.doorbell().answer(), "{name}: it rang");
                assert_eq!(attacker.run(), 1);
                assert_eq!(attacker.used(queue % 4), 0, "{name}: {state:#x}");
            }
        }
        assert_eq!(attacker.transport.faults(), 0, "{name}");
        attacker.assert_serves(name);
    }
}

#[test]
fn a_reset_with_chains_under_way_leaves_their_memory_alone() {
    for (name, mut attacker) in Attacker::each() {
        let last = attacker.queues - 1;
        attacker.up(F_VERSION_1, attacker.queues);
        attacker.descriptor(last, 0, (BUFFER, 4), 0, 0);
        attacker.offer(last, 0);
        attacker.set(register::STATUS, 0);
        assert!(
            attacker.transport.doorbell().answer(),
            "{name}: it rang before"
        );
        assert_eq!(attacker.run(), 1);
        assert_eq!(attacker.used(last), 0, "{name}");
        assert_eq!(attacker.transport.faults(), 0, "{name}");
        attacker.assert_serves(name);
    }
}

#[test]
fn interrupts_that_were_never_raised_can_be_acknowledged() {
    for (name, mut attacker) in Attacker::each() {
        attacker.up(F_VERSION_1, attacker.queues);
        let _ = attacker.transport.interrupt().fd().read();
        attacker.set(register::INTERRUPT_ACK, u32::MAX);
        assert_eq!(attacker.get(register::INTERRUPT_STATUS), 0);
        assert!(attacker.transport.interrupt().fd().read().is_err());
        attacker.assert_unaffected(name);
    }
}

/// A template's file can contain such registers; see also the snapshot's fuzz target.
#[test]
fn saved_registers_that_no_device_has_are_refused() {
    for (name, mut attacker) in Attacker::each() {
        attacker.up(F_VERSION_1, attacker.queues);
        let saved = attacker.transport.save();
        attacker.replace_memory(RAM);
        attacker.transport.restore(&saved).unwrap();
        assert!(attacker.transport.active(), "{name}");
        // In memory of half the size, the descriptors lie outside.
        let far = [RAM - 0x1000, parts(0)[1], parts(0)[2]];
        attacker.up_with(F_VERSION_1, attacker.queues, 0, far);
        let saved = attacker.transport.save();
        attacker.replace_memory(RAM / 2);
        let refused = attacker.transport.restore(&saved).unwrap_err();
        assert!(refused.to_string().contains("outside"), "{name}: {refused}");
    }
}
