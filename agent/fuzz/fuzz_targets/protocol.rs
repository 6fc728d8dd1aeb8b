//! A byte stream in pieces, as either side would receive it: greeting, requests, responses.
#![no_main]

use hearth_agent::proto::{FrameBuffer, Hello, MAX_FRAME, Request, Response, encode};
use libfuzzer_sys::fuzz_target;

/// Decodes a payload, and returns it encoded again: a decoded message must survive the round trip.
fn said<'a, T>(payload: &'a [u8], decode: impl Fn(&'a [u8]) -> Option<T>) -> Option<Vec<u8>>
where
    T: serde::Serialize,
{
    let message = decode(payload)?;
    let mut frame = Vec::new();
    encode(&message, &mut frame).expect("what came in a frame fits in one");
    Some(frame[4..].to_vec())
}

fuzz_target!(|input: &[u8]| {
    let Some((sizes, bytes)) = input.split_at_checked(8) else {
        return;
    };
    let mut buffer = FrameBuffer::new();
    let mut rest = bytes;
    let mut sizes = sizes.iter().cycle();
    while !rest.is_empty() {
        let Ok(spare) = buffer.spare() else { return };
        assert!(!spare.is_empty() && spare.len() <= MAX_FRAME + 4 + 4096);
        let wanted = usize::from(*sizes.next().expect("a cycle")).max(1);
        let count = wanted.min(spare.len()).min(rest.len());
        spare[..count].copy_from_slice(&rest[..count]);
        buffer.filled(count);
        rest = &rest[count..];
        loop {
            match buffer.next_frame() {
                Ok(Some(payload)) => {
                    let _ = Hello::decode(payload);
                    if let Some(again) = said(payload, |bytes| Request::decode(bytes).ok()) {
                        assert_eq!(Request::decode(&again), Request::decode(payload));
                    }
                    if let Some(again) = said(payload, |bytes| Response::decode(bytes).ok()) {
                        assert_eq!(Response::decode(&again), Response::decode(payload));
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
