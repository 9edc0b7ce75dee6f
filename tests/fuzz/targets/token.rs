//! Task tokens: nothing a stranger makes up is accepted, and a changed one never.
#![no_main]

use libfuzzer_sys::fuzz_target;
use proto::{
    id::{DeliveryId, RequestId},
    token::{Claims, DeliveryClaims, OwnerMark, TaskToken, TokenKeys},
};

fuzz_target!(|data: (&str, usize, u8)| {
    let (text, position, change) = data;
    let keys = TokenKeys::new(&[7; 32], Some(&[8; 32])).unwrap();
    assert!(keys.verify(text, 0).is_err());
    let claims = Claims {
        request_id: RequestId::from_random([1; 16]),
        mailbox: "m".parse().unwrap(),
        tunnel: "web".parse().unwrap(),
        expires_at: u64::MAX,
    };
    let later = DeliveryClaims {
        delivery: DeliveryId::new(1, [1; 10]),
        attempt: 1,
        tunnel: "web".parse().unwrap(),
        owner: OwnerMark::from(&"alice".parse().unwrap()),
        expires_at: u64::MAX,
        task_token: TaskToken::new("AQ+/=").unwrap(),
    };
    for token in [keys.mint(&claims), keys.mint_delivery(&later)] {
        let mut token = token.into_bytes();
        assert!(keys.verify(std::str::from_utf8(&token).unwrap(), 0).is_ok());
        let position = position % token.len();
        // Another character of the alphabet, so that the change is not only one of form.
        let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let changed = alphabet[usize::from(change) % alphabet.len()];
        if token[position] != changed {
            token[position] = changed;
            assert!(keys.verify(std::str::from_utf8(&token).unwrap(), 0).is_err());
        }
    }
});
