//! Attacks on a read-only pmem file by requests to its device. Writes to the file's memory are in
//! `tests/pmem.rs`.

use hearth_tests::flat::Code;
use hearth_tests::kvm;
use tempfile::NamedTempFile;

use crate::driver::*;

/// The address of the pmem file in the guest.
const AT: u64 = 1 << 32;

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(2 << 20).unwrap();
    file
}

/// Offers a request of these two buffers to a device that serves.
fn ask(kind: (u64, u32), result: (u64, u32)) -> Code {
    let code = descriptor(live(IMAGE), 0, 0, kind, NEXT, 1);
    offer(descriptor(code, 0, 1, result, WRITE, 0), 0, 0, 1)
}

#[tokio::test]
async fn requests_that_are_none_need_a_reset_and_leave_the_image_alone() {
    if !kvm() {
        return;
    }
    let (kind, result) = ((BUFFER.into(), 4), (u64::from(BUFFER) + 8, 4));
    let lacking = "without its 4 bytes each way";
    let outside = "outside guest memory";
    let [desc, driver, _] = rings(0).map(u64::from);
    for (attack, code, why) in [
        ("a type of 3 bytes", ask((kind.0, 3), result), lacking),
        ("a result of 3 bytes", ask(kind, (result.0, 3)), lacking),
        ("a result in the image", ask(kind, (AT, 4)), outside),
        (
            "a result over the end of memory",
            ask(kind, (END - 2, 4)),
            outside,
        ),
        ("a type in the image", ask((AT, 4), result), outside),
        ("a flush of nothing", offer(live(IMAGE), 0, 0, 1), lacking),
        (
            "a ring in the image",
            start(queue(negotiated(IMAGE), 0, 8, [desc, driver, AT])),
            outside,
        ),
    ] {
        let image = image();
        let vm = create(expect_reset(code), Some(image.path()));
        let said = run(&vm).await;
        assert_eq!(said.len(), 1, "{attack}");
        assert_fault(attack, &vm, IMAGE, why);
        let content = std::fs::read(image.path()).unwrap();
        assert!(content.iter().all(|byte| *byte == 0), "{attack}");
    }
}

#[tokio::test]
async fn a_request_of_a_type_that_does_not_exist_is_refused() {
    if !kvm() {
        return;
    }
    // A flush first: without it the answers to the others would prove nothing.
    for (kind, answer) in [(0, 0), (1, 0xff), (u32::MAX, 0xff)] {
        let code = Code::new()
            .store(BUFFER, kind)
            .store(BUFFER + 8, 0x5555_5555);
        let asked = ask((BUFFER.into(), 4), (u64::from(BUFFER) + 8, 4));
        let code = code
            .raw(&asked.bytes())
            .await_change16(rings(0)[2] + 2, 0)
            .print_byte(BUFFER + 8);
        let image = image();
        let vm = create(code.report(1).spin(), Some(image.path()));
        assert_eq!(run(&vm).await, [answer], "{kind}");
        assert_no_fault("a type that does not exist", &vm);
    }
}
