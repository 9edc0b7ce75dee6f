//! Request-targets: what is accepted goes through the HTTP stack to the byte, and taking a segment off
//! leaves an acceptable one.
#![no_main]

use http::uri::PathAndQuery;
use libfuzzer_sys::fuzz_target;
use proto::target::Target;

fuzz_target!(|text: &str| {
    let Ok(target) = Target::parse(text) else { return };
    assert_eq!(target.as_str(), text);
    assert!(!text.bytes().any(|byte| byte <= b' ' || byte == b'#' || byte >= 0x7f));
    assert_eq!(PathAndQuery::try_from(text).unwrap().as_str(), text);
    if let Some((segment, rest)) = target.split_first_segment() {
        assert!(!segment.is_empty() && !segment.contains(['/', '?']));
        assert!(Target::parse(rest.as_str()).is_ok());
    }
});
