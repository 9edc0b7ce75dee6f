#!/usr/bin/env bash
# tungstenite (a crate, 0.30.0): a client refuses a 101 whose Connection field lists more than Upgrade.
#
# Expected: Connection is a list (RFC 9110 7.6.1), and a client looks for the token Upgrade in it (RFC 6455 4.1);
#           ws, websockets and wsproto do. The crate's own server takes `keep-alive, Upgrade` in a request.
# Seen:     the handshake fails with "Missing, duplicated or incorrect header connection".
# Source:   src/handshake/client.rs compares the whole value; run below over the crate's sans-IO stream.
# For us:   an upstream's 101 is read by our own rules before the socket is handed to tungstenite, and what we
#           send ourselves is `Connection: Upgrade` alone.
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
tungstenite = { version = "=0.30.0", default-features = false, features = ["handshake"] }
TOML
cat >src/main.rs <<'RS'
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use tungstenite::handshake::derive_accept_key;

/// What a client makes of a 101 with this field.
fn handshake(connection: &'static str) -> Result<(), String> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut reader = BufReader::new(stream);
        let mut key = String::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("sec-websocket-key")
            {
                key = derive_accept_key(value.trim().as_bytes());
            }
            if line == "\r\n" {
                break;
            }
        }
        write!(
            reader.get_mut(),
            "HTTP/1.1 101 Switching Protocols\r\nConnection: {connection}\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {key}\r\n\r\n"
        )
        .unwrap();
        let _ = reader.read(&mut [0]);
    });
    let stream = TcpStream::connect(address).unwrap();
    let outcome = tungstenite::client(format!("ws://{address}/"), stream).map(drop).map_err(|error| error.to_string());
    server.join().unwrap();
    outcome
}

fn main() {
    let alone = handshake("Upgrade");
    let list = handshake("keep-alive, Upgrade");
    println!("Connection: Upgrade              -> {alone:?}");
    println!("Connection: keep-alive, Upgrade  -> {list:?}");
    assert!(alone.is_ok() && list.is_err(), "no longer as described");
    println!("as described: the list is refused");
}
RS
cargo run --quiet
