//! Every known way to get in without a good token, and the ways to get in with one.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use authorizer::{
    Authorizer, Error,
    config::{Config, ConfigError},
    key::KeySet,
    verify::{self, Identity, LIFETIME, Reason, Revoked, Rules, SKEW},
};
use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    hmac,
    rand::SystemRandom,
    rsa::{KeyPair as RsaKeyPair, KeySize},
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RSA_PSS_SHA256,
    },
};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD},
};
use edge::config::Env;
use serde_json::{Value, json};

mod list;
mod signed;

use self::{list::attacks, signed::*};

#[tokio::test]
async fn no_attack_is_accepted_and_all_are_answered_alike() {
    let keys = Keys::new();
    let (set, authorizer) = (key_set(&keys), authorizer(&keys.jwks()));
    let attacks = attacks(&keys);
    let mut wrong = Vec::new();
    for (name, token, expected) in &attacks {
        let found = verify_at(token, &set, NOW);
        if found.as_ref().err() != Some(expected) {
            wrong.push(format!("{name}: {found:?} instead of {expected:?}"));
        }
        // Blanks around the value of a header field are no part of it (RFC 9110 §5.5).
        if token.trim_matches([' ', '\t']) == token {
            // A header field cannot carry every byte: where it cannot, the event is refused as a whole.
            let answer = answer(&authorizer, &bearing(token)).await;
            if answer != DENIED && answer != DENIED.replace(ARN, "*") {
                wrong.push(format!("{name}: answered {answer}"));
            }
        }
        let by_query = authorizer.answer(&event(&[], &[("token", token)]), NOW).await.unwrap();
        if by_query.is_allow() || serde_json::to_string(&by_query).unwrap() != DENIED {
            wrong.push(format!("{name}: answered {by_query:?} by query"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), attacks.len(), wrong.join("\n"));
    assert!(attacks.len() >= 60, "{}", attacks.len());
    println!("{} attacks refused", attacks.len());
}

#[test]
fn a_good_token_of_each_algorithm_is_accepted() {
    let keys = Keys::new();
    let set = key_set(&keys);
    let expected = Identity {
        owner: "acme".parse().unwrap(),
        tunnels: "web,pr-*".parse().unwrap(),
        expires_at: NOW + 3600,
        token_id: Some("t1".into()),
    };
    for (signer, alg, id) in [
        (Signer::Ed, "EdDSA", "ed"),
        (Signer::Es, "ES256", "es"),
        (Signer::Rs, "RS256", "rs"),
        (Signer::Hs, "HS256", "hs256"),
    ] {
        assert_eq!(
            verify_at(&keys.headed(signer, &header(alg, id)), &set, NOW).as_ref(),
            Ok(&expected),
            "{alg}"
        );
    }
}

#[test]
fn what_identity_providers_add_does_no_harm() {
    let keys = Keys::new();
    let set = key_set(&keys);
    for header in [
        json!({"alg": "EdDSA", "kid": "ed"}),
        json!({"alg": "EdDSA", "kid": "ed", "typ": "at+jwt"}),
        json!({"alg": "EdDSA", "kid": "ed", "typ": "jwt", "x5t": "abc", "ver": 2}),
    ] {
        assert!(verify_at(&keys.headed(Signer::Ed, &header), &set, NOW).is_ok(), "{header}");
    }
    for (name, value) in [
        ("aud", json!(["other", "tunnel"])),
        ("tunnels", json!(["*"])),
        ("tunnels", json!(["web", "web"])),
        ("scope", json!("a b")),
        ("amr", json!([{"x": 1.5, "y": null}, -1, true])),
    ] {
        assert!(verify_at(&keys.claiming(name, value.clone()), &set, NOW).is_ok(), "{name} {value}");
    }
    for name in ["nbf", "iat", "jti"] {
        assert!(verify_at(&keys.claiming(name, None), &set, NOW).is_ok(), "{name}");
    }
}

#[test]
fn skew_is_30_seconds_and_not_one_more() {
    let keys = Keys::new();
    let set = key_set(&keys);
    let good = keys.good();
    let end = NOW + 3600;
    for (now, expected) in [
        (NOW - SKEW_SECS - 1, Some(Reason::NotYet)),
        (NOW - SKEW_SECS, None),
        (NOW, None),
        (end - 1, None),
        (end, None),
        (end + SKEW_SECS - 1, None),
        (end + SKEW_SECS, Some(Reason::Expired)),
        (u64::MAX, Some(Reason::Expired)),
        (0, Some(Reason::Expiry)),
    ] {
        assert_eq!(verify_at(&good, &set, now).err(), expected, "{now}");
    }
    let longest = keys.claiming("exp", json!(NOW + LIFETIME.as_secs()));
    assert!(verify_at(&longest, &set, NOW).is_ok());
}

#[test]
fn a_key_is_rotated_by_serving_both_for_a_while() {
    let (old, new) = (Keys::new(), Keys::new());
    let tokens =
        [old.headed(Signer::Ed, &header("EdDSA", "2025")), new.headed(Signer::Ed, &header("EdDSA", "2026"))];
    let set = |jwks: &[Value]| KeySet::from_jwks(json!({"keys": jwks}).to_string().as_bytes()).unwrap();
    let (old, new) = (old.jwk(Signer::Ed, "2025"), new.jwk(Signer::Ed, "2026"));
    let accepted = |set: &KeySet| tokens.each_ref().map(|token| verify_at(token, set, NOW).is_ok());
    assert_eq!(accepted(&set(std::slice::from_ref(&old))), [true, false]);
    assert_eq!(accepted(&set(&[old, new.clone()])), [true, true]);
    assert_eq!(accepted(&set(&[new])), [false, true]);
}

#[test]
fn a_refusal_shows_a_key_id_only_if_it_is_plain_and_an_owner_only_if_it_is_proved() {
    let keys = Keys::new();
    let set = key_set(&keys);
    let refusal = |token: &str| {
        let token = verify::parse(token).unwrap();
        let Some(key) = set.get(token.key_id()) else { return token.refused(Reason::UnknownKey) };
        token.verify(key, &rules(), NOW).unwrap_err()
    };
    let shown =
        |id: &str| refusal(&keys.headed(Signer::Ed, &header("EdDSA", id))).key_id.map(|id| id.to_string());
    assert_eq!(shown("no-such-key"), Some("no-such-key".into()));
    for id in ["a b", "a\nb", "ä", "\u{1b}[2J", &"a".repeat(65)] {
        assert_eq!(shown(id), None, "{id:?}");
    }
    let expired = refusal(&keys.claiming("exp", json!(1)));
    assert_eq!((expired.reason, expired.owner.unwrap().as_str()), (Reason::Expired, "acme"));
    let good = keys.good();
    let forged = refusal(&format!("{}{}", &good[..good.len() - 4], "AAAA"));
    assert_eq!((forged.reason, forged.owner), (Reason::Signature, None));
}

#[tokio::test]
async fn a_good_token_is_answered_with_the_context_that_the_other_functions_read() {
    let keys = Keys::new();
    let authorizer = authorizer(&keys.jwks());
    let expected = json!({
        "principalId": "acme",
        "policyDocument": {"Version": "2012-10-17", "Statement": [
            {"Action": ["execute-api:Invoke"], "Effect": "Allow", "Resource": [ARN]},
        ]},
        "context": {"owner": "acme", "tunnels": "web,pr-*", "token_expires": NOW + 3600, "token_id": "t1"},
    });
    let good = keys.good();
    for event in [
        bearing(&good),
        event(&[("authorization", &format!("bearer {good}"))], &[]),
        event(&[("AUTHORIZATION", &format!("BEARER  {good}"))], &[("token", "ignored")]),
        event(&[("X-Other", "1")], &[("token", &good)]),
    ] {
        assert_eq!(
            serde_json::from_str::<Value>(&answer(&authorizer, &event).await).unwrap(),
            expected,
            "{event}"
        );
    }
}

#[tokio::test]
async fn the_largest_answer_is_within_what_api_gateway_takes() {
    let keys = Keys::new();
    let tunnels: Vec<String> = (0..36).map(|n| format!("{n:02}{}-*", "x".repeat(58))).collect();
    let claims = with(with(claims(), "tunnels", json!(tunnels)), "sub", json!("\"".repeat(128)));
    let token = keys.sign(
        Signer::Ed,
        header("EdDSA", "ed").to_string(),
        with(claims, "jti", json!("\\".repeat(100))).to_string(),
    );
    assert!(token.len() > 3900 && token.len() <= verify::TOKEN_BYTES, "{}", token.len());
    let answer = answer(&authorizer(&keys.jwks()), &bearing(&token)).await;
    assert!(answer.contains("Allow") && answer.len() < 8 * 1024, "{}", answer.len());
}

#[tokio::test]
async fn credentials_that_are_no_single_bearer_token_are_refused() {
    let keys = Keys::new();
    let authorizer = authorizer(&keys.jwks());
    let good = keys.good();
    let bearer = format!("Bearer {good}");
    let field = |value: &str| event(&[("Authorization", value)], &[]);
    for (name, event) in [
        ("Basic", field(&format!("Basic {good}"))),
        ("Basic as it is used", field(&format!("Basic {}", STANDARD.encode(format!("x:{good}"))))),
        ("Digest", field(&format!("Digest {good}"))),
        ("no scheme", field(&good)),
        ("scheme alone", field("Bearer")),
        ("scheme and blank", field("Bearer ")),
        ("nothing", field("")),
        ("scheme without a blank", field(&format!("Bearer{good}"))),
        ("scheme with a colon", field(&format!("Bearer: {good}"))),
        ("scheme and tab", field(&format!("Bearer\t{good}"))),
        ("scheme twice", field(&format!("Bearer Bearer {good}"))),
        ("a parameter after", field(&format!("Bearer {good}, realm=x"))),
        ("two tokens", field(&format!("Bearer {good} {good}"))),
        ("two fields", event(&[("Authorization", &bearer), ("Authorization", &bearer)], &[])),
        ("two fields by case", event(&[("Authorization", &bearer), ("authorization", &bearer)], &[])),
        (
            "a bad field before a good one",
            event(&[("Authorization", "Bearer x"), ("Authorization", &bearer)], &[]),
        ),
        ("two fields joined", field(&format!("{bearer}, {bearer}"))),
        ("a bad field and a good parameter", event(&[("Authorization", "Bearer x")], &[("token", &good)])),
        ("an empty field and a good parameter", event(&[("Authorization", "")], &[("token", &good)])),
        ("two parameters", event(&[], &[("token", &good), ("token", &good)])),
        ("a parameter with the scheme", event(&[], &[("token", &bearer)])),
        ("an empty parameter", event(&[], &[("token", "")])),
    ] {
        assert_eq!(answer(&authorizer, &event).await, DENIED, "{name}");
    }
}

#[tokio::test]
async fn without_a_credential_the_answer_is_the_error_that_becomes_401() {
    let keys = Keys::new();
    for authorizer in [authorizer(&keys.jwks()), Authorizer::new(configured(|_| None))] {
        for event in
            [event(&[], &[]), event(&[("Cookie", "token=x")], &[("Token", "x"), ("access_token", "x")])]
        {
            assert_eq!(authorizer.answer(&event, NOW).await.err(), Some(Error::Unauthorized), "{event}");
        }
    }
    assert_eq!(lambda_runtime::Diagnostic::from(Error::Unauthorized).error_message, "Unauthorized");
}

#[tokio::test]
async fn malformed_events_are_refused() {
    let keys = Keys::new();
    let authorizer = authorizer(&keys.jwks());
    let good = bearing(&keys.good());
    let without_arn = good.replacen("methodArn", "methodArm", 1);
    let unprintable = good.replacen("Bearer ", "Bearer \\u0007", 1);
    for event in ["", "null", "[]", "{}", "\"x\"", &without_arn, &unprintable] {
        let policy = authorizer.answer(event, NOW).await;
        assert!(policy.as_ref().is_ok_and(|policy| !policy.is_allow()), "{event}: {policy:?}");
    }
}

#[tokio::test]
async fn without_a_usable_configuration_everything_is_refused() {
    let keys = Keys::new();
    let jwks = keys.jwks();
    let broken = |name: &'static str, value: &'static str| {
        let jwks = jwks.clone();
        configured(move |asked| match asked {
            _ if asked == name => Some(value.to_owned()),
            "TUNNEL_JWKS" => Some(jwks.clone()),
            _ => None,
        })
    };
    for config in [
        configured(|_| None),
        broken("TUNNEL_JWKS", "{}"),
        broken("TUNNEL_HS256_SECRET", "c2hvcnQ="),
        broken("TUNNEL_JWKS_URL", "https://id.example.com/jwks"),
        broken("TUNNEL_JWKS_FILE", "jwks.json"),
        broken("TUNNEL_REVOKED", "stolen"),
    ] {
        assert!(config.is_err());
        assert_eq!(answer(&Authorizer::new(config), &bearing(&keys.good())).await, DENIED);
    }
}

#[tokio::test]
async fn another_issuer_audience_and_owner_claim_can_be_configured() {
    let keys = Keys::new();
    let jwks = keys.jwks();
    let authorizer = Authorizer::new(configured(|name| match name {
        "TUNNEL_JWKS" => Some(jwks.clone()),
        "TUNNEL_TOKEN_ISSUER" => Some("https://id.example.com/".into()),
        "TUNNEL_TOKEN_AUDIENCE" => Some("edge".into()),
        "TUNNEL_OWNER_CLAIM" => Some("team".into()),
        _ => None,
    }));
    let claims = with(
        with(with(claims(), "iss", json!("https://id.example.com/")), "aud", json!("edge")),
        "team",
        json!("red"),
    );
    let token = keys.sign(Signer::Rs, header("RS256", "rs").to_string(), claims.to_string());
    assert!(answer(&authorizer, &bearing(&token)).await.contains(r#""owner":"red""#));
    assert_eq!(answer(&authorizer, &bearing(&keys.good())).await, DENIED);
}

/// `cargo test --profile dist -p authorizer --test attacks -- --ignored --nocapture`
#[test]
#[ignore = "measures, and means something in a build as it ships only"]
fn verification_takes_less_than_two_milliseconds() {
    let keys = Keys::new();
    let set = key_set(&keys);
    for (signer, alg, id) in [
        (Signer::Ed, "EdDSA", "ed"),
        (Signer::Es, "ES256", "es"),
        (Signer::Rs, "RS256", "rs"),
        (Signer::Hs, "HS256", "hs256"),
    ] {
        let token = keys.headed(signer, &header(alg, id));
        let mut micros: Vec<u128> = (0..5000)
            .map(|_| {
                let start = std::time::Instant::now();
                assert!(verify_at(&token, &set, NOW).is_ok());
                start.elapsed().as_micros()
            })
            .collect();
        micros.sort_unstable();
        let [median, p99, worst] = [2500, 4950, 4999].map(|rank| micros[rank]);
        println!("{alg}: median {median} us, p99 {p99} us, longest {worst} us");
        assert!(p99 <= 2000);
    }
}
