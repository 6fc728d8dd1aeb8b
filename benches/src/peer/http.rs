//! The part of HTTP that Firecracker's API needs.

use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::PeerError;

/// Pause between two attempts to connect to the socket.
const PAUSE: Duration = Duration::from_millis(1);
/// Longest answer.
const MOST: usize = 64 << 10;

/// Sends one request; any answer but success is an error.
pub(super) async fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: &serde_json::Value,
) -> Result<(), PeerError> {
    let mut stream = connect(socket).await?;
    let body = body.to_string();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await?;
    let answer = answer(&mut stream).await?;
    let status = answer.split(' ').nth(1).unwrap_or_default();
    match status.starts_with('2') {
        true => Ok(()),
        false => Err(PeerError::Refused {
            what: format!("{method} {path}"),
            said: answer,
        }),
    }
}

/// Connects to the socket, which appears some time after the process.
pub(super) async fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            // The caller bounds the time.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Reads an answer's head and body.
async fn answer(stream: &mut UnixStream) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                let is_length = name.eq_ignore_ascii_case("content-length");
                is_length.then(|| value.trim().parse::<usize>().ok())?
            });
            if body.len() >= length.unwrap_or(0) {
                return Ok(text.into_owned());
            }
        }
        match stream.read(&mut chunk).await? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            _ if bytes.len() > MOST => return Err(std::io::ErrorKind::InvalidData.into()),
            count => bytes.extend(chunk.iter().take(count)),
        }
    }
}
