//! Peers for tests of the sockets between guest and host, in both directions.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    sync::Arc,
    thread,
};

use rustix::net::{
    AddressFamily, Shutdown, SocketFlags, SocketType, accept_with, bind, connect, listen, shutdown,
    socket_with,
};

use super::number;
use crate::sys::VsockAddr;

const BACKLOG: i32 = 256;

/// `vsock-echo PORT`: listens and sends back what each connection brings, until it ends its direction.
pub(super) fn echo(args: &[OsString]) -> io::Result<u8> {
    let socket = socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(
        &socket,
        &VsockAddr {
            cid: VsockAddr::ANY_CID,
            port: number(args, 0)?,
        },
    )?;
    listen(&socket, BACKLOG)?;
    println!("listening");
    loop {
        let stream = File::from(accept_with(&socket, SocketFlags::CLOEXEC)?);
        // A connection each, so that one that nobody reads holds up no other.
        thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(move || copy(&stream, &stream, true))?;
    }
}

/// `vsock-dial PORT`: connects to the host; stdin goes there, what comes back goes to stdout.
pub(super) fn dial(args: &[OsString]) -> io::Result<u8> {
    let socket = socket_with(
        AddressFamily::VSOCK,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    connect(
        &socket,
        &VsockAddr {
            cid: VsockAddr::HOST_CID,
            port: number(args, 0)?,
        },
    )?;
    let stream = Arc::new(File::from(socket));
    let theirs = Arc::clone(&stream);
    let stdin = File::from(rustix::io::dup(rustix::stdio::stdin())?);
    let sending = thread::spawn(move || copy(&stdin, &theirs, true));
    copy(
        &stream,
        &File::from(rustix::io::dup(rustix::stdio::stdout())?),
        false,
    )?;
    sending
        .join()
        .map_err(|_| io::Error::other("the sending thread failed"))??;
    Ok(0)
}

fn copy(mut from: &File, mut to: &File, to_socket: bool) -> io::Result<()> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        to.write_all(chunk.get(..count).unwrap_or_default())?;
    }
    if to_socket {
        shutdown(to, Shutdown::Write)?;
    }
    Ok(())
}
