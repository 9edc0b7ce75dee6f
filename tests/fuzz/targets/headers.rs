//! Header lists: nothing that could end a field gets in, and stripping leaves no hop-by-hop field.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::header::Headers;

fuzz_target!(|text: &str| {
    let Ok(mut headers) = serde_json::from_str::<Headers>(text) else { return };
    for (name, value) in headers.iter() {
        assert!(!name.as_str().is_empty());
        assert!(!value.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)));
    }
    let again = serde_json::to_string(&headers).unwrap();
    assert_eq!(serde_json::from_str::<Headers>(&again).unwrap(), headers);
    headers.strip_hop_by_hop();
    for name in ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-connection"] {
        assert!(headers.get(name).is_none());
    }
    let once = headers.clone();
    headers.strip_hop_by_hop();
    assert_eq!(headers, once);
});
