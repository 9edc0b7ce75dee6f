#!/usr/bin/env bash
# tungstenite (a crate, 0.30.0): a close with code 1014 is given to its reader as one with 1002.
#
# Expected: 1014 (Bad Gateway) is registered (IANA, "WebSocket Close Code Number Registry"), so that a peer may send it, as
#           ws for Node.js does; the reader gets code and reason as they came, as with 1013.
# Seen:     the reader gets 1002 "Protocol violation", the peer's code and reason are gone, and the peer is told 1002.
# Source:   src/protocol/frame/coding.rs knows no 1014 and counts it as a bad code; run below over bytes in memory.
# For us:   docs/websockets.md says that 1014 arrives as 1002.
# Needs:    cargo.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
mkdir src
cat >Cargo.toml <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2024"
[dependencies]
tungstenite = { version = "=0.30.0", default-features = false }
TOML
cat >src/main.rs <<'RS'
use std::io::{Cursor, Read, Result, Write};

use tungstenite::{Message, WebSocket, protocol::Role};

/// What has come from a peer; what is sent to it is dropped.
struct Peer(Cursor<Vec<u8>>);

impl Read for Peer {
    fn read(&mut self, room: &mut [u8]) -> Result<usize> {
        self.0.read(room)
    }
}

impl Write for Peer {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The code and reason that a client reads of a server's close.
fn closed(code: u16) -> (u16, String) {
    let reason = b"gone";
    let mut frame = vec![0x88, 2 + reason.len() as u8];
    frame.extend_from_slice(&code.to_be_bytes());
    frame.extend_from_slice(reason);
    let mut socket = WebSocket::from_raw_socket(Peer(Cursor::new(frame)), Role::Client, None);
    match socket.read() {
        Ok(Message::Close(Some(frame))) => (frame.code.into(), frame.reason.to_string()),
        other => panic!("no close: {other:?}"),
    }
}

fn main() {
    let (registered, other) = (closed(1014), closed(1013));
    println!("1013 is read as {other:?}, 1014 as {registered:?}");
    assert_eq!(other, (1013, "gone".to_owned()));
    assert_eq!(registered.0, 1002, "no longer as described");
    println!("as described: 1014 is 1002");
}
RS
cargo run --quiet
