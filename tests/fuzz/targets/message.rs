//! Messages of either direction: no panic, bounded bodies, and what was read is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::{
    body::{Body, COMPRESSED_CHUNK_BYTES},
    limits::MESSAGE_BYTES,
    message::{AgentMessage, EdgeMessage, Envelope},
};

fn check(body: Option<Body<'_>>) {
    if let Some(bytes) = body.and_then(|body| body.decode().ok()) {
        assert!(bytes.len() <= COMPRESSED_CHUNK_BYTES.max(MESSAGE_BYTES));
    }
}

fuzz_target!(|text: &str| {
    if text.len() > MESSAGE_BYTES {
        return;
    }
    let _ = Envelope::peek(text);
    if let Ok(message) = AgentMessage::decode(text) {
        let again = message.encode();
        assert_eq!(AgentMessage::decode(&again).unwrap(), message);
        match message {
            AgentMessage::Reply(reply) => check(reply.body),
            AgentMessage::Chunk(chunk) => check(chunk.body),
            _ => {}
        }
    }
    if let Ok(message) = EdgeMessage::decode(text) {
        let again = message.encode();
        assert_eq!(EdgeMessage::decode(&again).unwrap(), message);
        match message {
            EdgeMessage::Request(request) => check(request.body),
            EdgeMessage::RequestChunk(chunk) => check(Some(chunk.body)),
            _ => {}
        }
    }
});
