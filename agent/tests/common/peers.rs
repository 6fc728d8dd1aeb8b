//! Peers that send what a test scripts.

use std::time::Duration;

use hearth_agent::{
    client::AgentClient,
    proto::{FrameBuffer, Hello, Rejection, Request, Response, encode},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::Agent;

/// Encodes a greeting and requests.
pub fn wire(requests: &[Request<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    Hello::default().encode(&mut out).unwrap();
    requests
        .iter()
        .for_each(|request| encode(request, &mut out).unwrap());
    out
}

/// Sends bytes and returns the last rejection that the agent sends before it closes the connection.
pub async fn last_word(agent: &Agent, bytes: &[u8]) -> Option<Rejection> {
    let mut stream = agent.stream().await.unwrap();
    // The agent may close the connection before everything is written.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer))
        .await
        .expect("no hang-up")
        .ok();
    let (mut buffer, mut rest, mut last) = (FrameBuffer::new(), answer.as_slice(), None);
    while !rest.is_empty() {
        let room = buffer.spare().unwrap();
        let count = room.len().min(rest.len());
        room[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        buffer.filled(count);
        while let Some(payload) = buffer.next_frame().unwrap() {
            if let Ok(Response::Rejected(reason)) = Response::decode(payload) {
                last = Some(reason);
            }
        }
    }
    last
}

fn greeting() -> Vec<u8> {
    let mut out = Vec::new();
    Hello::default().encode(&mut out).unwrap();
    out
}

/// Encodes responses.
pub fn say(responses: &[Response<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    responses
        .iter()
        .for_each(|response| encode(response, &mut out).unwrap());
    out
}

/// Returns a client of a guest that has sent its greeting and these responses, and the guest's end.
pub async fn scripted(responses: &[Response<'_>]) -> (AgentClient<DuplexStream>, DuplexStream) {
    let (ours, mut guest) = duplex(1 << 20);
    guest
        .write_all(&[greeting(), say(responses)].concat())
        .await
        .unwrap();
    (AgentClient::handshake(ours).await.unwrap(), guest)
}
