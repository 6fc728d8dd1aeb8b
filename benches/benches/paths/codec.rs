//! Frames of the agent's protocol: encoded, cut out of the stream again and decoded.

use hearth_agent::proto::{Exec, FrameBuffer, Request, Response, encode};

use super::Walk;

const CHUNK: usize = 16 << 10;

/// A request to run a program.
pub(super) fn exec() -> Walk {
    let word = |text: &str| text.as_bytes().to_vec().into();
    let exec = Exec {
        argv: ["python3", "-c", "print(6 * 7)"].map(word).to_vec(),
        env: (0..8)
            .map(|n| (word(&format!("NAME_{n}")), word("some value")))
            .collect(),
        timeout_ms: Some(1000),
        ..Exec::default()
    };
    let request = Request::Exec(Box::new(exec));
    let mut wire = Vec::new();
    Box::new(move || {
        wire.clear();
        encode(&request, &mut wire).unwrap();
        let mut frames = FrameBuffer::new();
        cut(&mut frames, &wire, |payload| {
            assert!(matches!(Request::decode(payload), Ok(Request::Exec(_))));
        });
    })
}

/// A program's output.
pub(super) fn output() -> Walk {
    let bytes = vec![b'x'; CHUNK];
    let (mut wire, mut frames) = (Vec::new(), FrameBuffer::new());
    Box::new(move || {
        wire.clear();
        encode(&Response::Stdout(&bytes), &mut wire).unwrap();
        cut(&mut frames, &wire, |payload| {
            let decoded = Response::decode(payload);
            assert!(matches!(decoded, Ok(Response::Stdout(out)) if out.len() == CHUNK));
        });
    })
}

/// Cuts one frame out of the encoded bytes.
fn cut(frames: &mut FrameBuffer, mut wire: &[u8], look: impl FnOnce(&[u8])) {
    loop {
        if let Some(payload) = frames.next_frame().unwrap() {
            return look(payload);
        }
        let room = frames.spare().unwrap();
        let count = room.len().min(wire.len());
        room[..count].copy_from_slice(&wire[..count]);
        wire = &wire[count..];
        frames.filled(count);
    }
}
