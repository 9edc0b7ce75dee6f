//! Every attack, and why it is refused.

use super::*;

/// By name: a token, and the reason to refuse it.
pub(crate) fn attacks(keys: &Keys) -> Vec<(String, String, Reason)> {
    let mut all: Vec<(String, String, Reason)> = Vec::new();
    let mut add = |name: &str, token: String, reason: Reason| all.push((name.into(), token, reason));
    let good = keys.good();
    let parts: Vec<&str> = good.split('.').collect();
    let [head, body, signature] = parts[..] else { unreachable!() };
    let message = format!("{head}.{body}");
    let ed = || header("EdDSA", "ed");

    // No signature, under every spelling and with every rest of one.
    for alg in ["none", "None", "NONE", "nOnE", "none ", "", "\u{0}none", "Null", "HS256 "] {
        let header = header(alg, "ed");
        for (kind, signature) in [("the old", signature), ("a zero", "AA")] {
            let token = format!("{}.{body}.{signature}", encode(header.to_string()));
            add(&format!("alg {alg:?} with {kind} signature"), token, Reason::Algorithm);
        }
        add(
            &format!("alg {alg:?} without a signature"),
            format!("{}.{body}.", encode(header.to_string())),
            Reason::Malformed,
        );
    }
    for (name, alg) in [
        ("missing", None),
        ("null", Some(Value::Null)),
        ("a list", Some(json!(["EdDSA"]))),
        ("a number", Some(json!(0))),
    ] {
        let mut header = ed();
        header.as_object_mut().unwrap().remove("alg");
        if let Some(alg) = alg {
            header["alg"] = alg;
        }
        add(&format!("alg {name}"), keys.headed(Signer::Ed, &header), Reason::Header);
    }

    // A public key taken for a secret, in every form in which one could have it.
    let x509 = AsDer::<PublicKeyX509Der<'_>>::as_der(keys.rs.public_key()).unwrap();
    let pem = |der: &[u8]| {
        let text = STANDARD.encode(der);
        let lines: Vec<&str> =
            text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
    };
    let publics: [(&str, &str, Vec<u8>); 9] = [
        ("RSA as PEM", "rs", pem(x509.as_ref()).into_bytes()),
        ("RSA as PEM without its last line end", "rs", pem(x509.as_ref()).trim_end().into()),
        ("RSA as DER", "rs", x509.as_ref().to_vec()),
        ("RSA as PKCS#1", "rs", keys.rs.public_key().as_ref().to_vec()),
        ("RSA modulus", "rs", keys.rs.public_key().modulus().big_endian_without_leading_zero().to_vec()),
        ("RSA as JWK", "rs", keys.jwk(Signer::Rs, "rs").to_string().into()),
        ("P-256 point", "es", keys.es.public_key().as_ref().to_vec()),
        ("Ed25519 raw", "ed", keys.ed.public_key().as_ref().to_vec()),
        ("Ed25519 as JWK", "ed", keys.jwk(Signer::Ed, "ed").to_string().into()),
    ];
    for (name, id, secret) in &publics {
        let message = format!("{}.{body}", encode(header("HS256", id).to_string()));
        let token = format!("{message}.{}", encode(mac(secret, message.as_bytes())));
        add(&format!("HS256 with the public key, {name}"), token, Reason::Algorithm);
        let message = format!("{}.{body}", encode(header("HS256", "hs256").to_string()));
        let token = format!("{message}.{}", encode(mac(secret, message.as_bytes())));
        add(&format!("HS256 under the secret's id with {name}"), token, Reason::Signature);
    }
    for (name, secret) in
        [("empty", &b""[..]), ("a usual one", b"secret"), ("its base64", STANDARD.encode(SECRET).as_bytes())]
    {
        let message = format!("{}.{body}", encode(header("HS256", "hs256").to_string()));
        let token = format!("{message}.{}", encode(mac(secret, message.as_bytes())));
        add(&format!("HS256 with a guessed secret, {name}"), token, Reason::Signature);
    }

    // An algorithm that is not the key's.
    for (alg, id) in [
        ("RS256", "es"),
        ("ES256", "rs"),
        ("EdDSA", "es"),
        ("EdDSA", "rs"),
        ("ES256", "ed"),
        ("RS256", "ed"),
        ("RS512", "rs"),
        ("PS256", "rs"),
        ("RS384", "rs"),
        ("ES384", "es"),
        ("HS512", "hs256"),
        ("HS384", "hs256"),
        ("EdDSA", "hs256"),
        ("Ed25519", "ed"),
        ("Ed448", "ed"),
        ("eddsa", "ed"),
        ("ES256K", "es"),
        ("RSA-OAEP", "rs"),
        ("dir", "hs256"),
    ] {
        let signer = match id {
            "ed" => Signer::Ed,
            "es" => Signer::Es,
            "rs" => Signer::Rs,
            _ => Signer::Hs,
        };
        add(&format!("{alg} for the key {id}"), keys.headed(signer, &header(alg, id)), Reason::Algorithm);
    }
    add("PSS under the name of RS256", keys.headed(Signer::Ps, &header("RS256", "rs")), Reason::Signature);
    add("PSS under its own name", keys.headed(Signer::Ps, &header("PS256", "rs")), Reason::Algorithm);

    // Key ids.
    for id in [
        "other",
        "ED",
        "ed ",
        " ed",
        "../ed",
        "../../../../dev/null",
        "ed/../ed",
        "/etc/passwd",
        "' OR '1'='1",
        "ed' UNION SELECT 'AA",
        "ed;--",
        "ed\u{0}",
        "\u{0}",
        "ed\n",
        "file:///dev/null",
        "http://127.0.0.1/jwks",
        "$(id)",
        "ed\u{202e}",
        "eｄ",
        "0",
        "*",
    ] {
        add(&format!("kid {id:?}"), keys.headed(Signer::Ed, &header("EdDSA", id)), Reason::UnknownKey);
    }
    add("kid of 129 bytes", keys.headed(Signer::Ed, &header("EdDSA", &"a".repeat(129))), Reason::UnknownKey);
    add("kid of nothing", keys.headed(Signer::Ed, &header("EdDSA", "")), Reason::UnknownKey);
    add("kid missing", keys.headed(Signer::Ed, &json!({"alg": "EdDSA"})), Reason::UnknownKey);
    for id in [json!(null), json!(0), json!(["ed"]), json!({"ed": "ed"}), json!(true)] {
        add(
            &format!("kid {id}"),
            keys.headed(Signer::Ed, &with(ed(), "kid", id.clone())),
            Reason::UnknownKey,
        );
    }
    add("kid of another key", keys.headed(Signer::Ed, &header("ES256", "es")), Reason::Signature);
    for header in [
        r#"{"alg":"EdDSA","kid":"ed","kid":"ed"}"#,
        r#"{"alg":"EdDSA","kid":"ed","\u006bid":"es"}"#,
        r#"{"alg":"none","alg":"EdDSA","kid":"ed"}"#,
        r#"{"alg":"EdDSA","alg":"none","kid":"ed"}"#,
        r#"{"alg":"EdDSA","kid":"ed","x":{"a":1,"a":2}}"#,
    ] {
        add(&format!("header {header}"), keys.sign(Signer::Ed, header, claims().to_string()), Reason::Header);
    }

    // Keys that the token brings itself, with a signature that they prove.
    let mallory = Keys::new();
    let own = mallory.jwk(Signer::Ed, "ed");
    for (name, value) in [
        ("jwk", own.clone()),
        ("jku", json!("https://mallory.example/jwks.json")),
        ("x5u", json!("https://mallory.example/x.pem")),
        ("x5c", json!(["MIIB"])),
        ("jku", json!("http://169.254.169.254/")),
        ("jwk", json!(null)),
        ("crit", json!(["exp"])),
        ("crit", json!([])),
        ("b64", json!(false)),
        ("b64", json!(true)),
        ("zip", json!("DEF")),
        ("enc", json!("A128GCM")),
    ] {
        let header = with(ed(), name, value.clone());
        add(
            &format!("own key by {name} {value}"),
            mallory.headed(Signer::Ed, &header),
            Reason::HeaderParameter,
        );
        add(
            &format!("good signature with {name} {value}"),
            keys.headed(Signer::Ed, &header),
            Reason::HeaderParameter,
        );
    }
    add("another's key under a known id", mallory.good(), Reason::Signature);
    add("another's RSA key", mallory.headed(Signer::Rs, &header("RS256", "rs")), Reason::Signature);
    add("another's P-256 key", mallory.headed(Signer::Es, &header("ES256", "es")), Reason::Signature);
    let unencoded = format!(
        "{}.{}.{signature}",
        encode(with(with(ed(), "b64", json!(false)), "crit", json!(["b64"])).to_string()),
        body
    );
    add("payload that is not encoded", unencoded, Reason::HeaderParameter);

    // Types.
    for typ in [
        json!("JWE"),
        json!("JOSE+JSON"),
        json!("dpop+jwt"),
        json!(""),
        json!(1),
        json!(null),
        json!(["JWT"]),
        json!("JWT\n"),
        json!("logout+jwt"),
    ] {
        add(&format!("typ {typ}"), keys.headed(Signer::Ed, &with(ed(), "typ", typ.clone())), Reason::Type);
    }

    // Signatures.
    let raw = URL_SAFE_NO_PAD.decode(signature).unwrap();
    add("signature of nothing", format!("{message}."), Reason::Malformed);
    add("signature gone with its dot", message.clone(), Reason::Malformed);
    add("signature cut by one byte", format!("{message}.{}", encode(&raw[..63])), Reason::Signature);
    add("signature cut to half", format!("{message}.{}", encode(&raw[..32])), Reason::Signature);
    add(
        "signature longer by one byte",
        format!("{message}.{}", encode([&raw[..], &[0]].concat())),
        Reason::Signature,
    );
    add("signature twice", format!("{message}.{}", encode([&raw[..], &raw[..]].concat())), Reason::Signature);
    add("signature of zeros", format!("{message}.{}", encode([0; 64])), Reason::Signature);
    add("signature of ones", format!("{message}.{}", encode([0xff; 64])), Reason::Signature);
    add(
        "Ed25519 identity point",
        format!("{message}.{}", encode([&[1][..], &[0; 63]].concat())),
        Reason::Signature,
    );
    for bit in [0, 7, 100, 255, 256, 400, 511] {
        let mut flipped = raw.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        add(
            &format!("signature with bit {bit} flipped"),
            format!("{message}.{}", encode(flipped)),
            Reason::Signature,
        );
    }
    // S + L is the same number modulo the group's order L (RFC 8032 §5.1.7 wants S < L).
    let order: [u8; 32] = [
        0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
    ];
    let mut malleable = raw.clone();
    let mut carry = 0;
    for (byte, order) in malleable[32..].iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(order) + carry;
        *byte = sum.to_le_bytes()[0];
        carry = sum >> 8;
    }
    add("Ed25519 signature with S + L", format!("{message}.{}", encode(malleable)), Reason::Signature);
    let es = format!("{}.{body}", encode(header("ES256", "es").to_string()));
    for (name, signature) in [
        ("zeros", vec![0; 64]),
        ("r = s = 1", [[0; 31].as_slice(), &[1], &[0; 31], &[1]].concat()),
        ("the order of the group", {
            let n = [
                0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc,
                0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
            ];
            [n, n].concat()
        }),
        ("ASN.1 of r = s = 0", vec![0x30, 6, 2, 1, 0, 2, 1, 0]),
    ] {
        add(&format!("P-256 signature of {name}"), format!("{es}.{}", encode(signature)), Reason::Signature);
    }
    let rs = format!("{}.{body}", encode(header("RS256", "rs").to_string()));
    for (name, signature) in [
        ("zeros", vec![0; 256]),
        ("one", [vec![0; 255], vec![1]].concat()),
        ("nothing much", vec![0]),
        ("the modulus", keys.rs.public_key().modulus().big_endian_without_leading_zero().to_vec()),
    ] {
        add(&format!("RSA signature of {name}"), format!("{rs}.{}", encode(signature)), Reason::Signature);
    }
    let mut other_claims = claims();
    other_claims["tunnels"] = json!(["*"]);
    add(
        "other claims under a good signature",
        format!("{head}.{}.{signature}", encode(other_claims.to_string())),
        Reason::Signature,
    );
    add(
        "other header under a good signature",
        format!("{}.{body}.{signature}", encode(with(ed(), "x", json!(1)).to_string())),
        Reason::Signature,
    );

    // Shapes.
    for (name, token) in [
        ("nothing", String::new()),
        ("one dot", ".".into()),
        ("two dots only", "..".into()),
        ("three dots", "...".into()),
        ("no dot", head.into()),
        ("four dots", format!("{good}..")),
        ("a part too many", format!("{good}.{signature}")),
        ("five parts of a JWE", format!("{good}.AA.AA")),
        ("header of nothing", format!(".{body}.{signature}")),
        ("claims of nothing", format!("{head}..{signature}")),
        ("blank before", format!(" {good}")),
        ("blank within", format!("{head} .{body}.{signature}")),
        ("line end after", format!("{good}\n")),
        ("CR LF within", format!("{head}.{body}\r\n.{signature}")),
        ("NUL after", format!("{good}\0")),
        ("tab after", format!("{good}\t")),
        ("quoted", format!("\"{good}\"")),
        ("padding", format!("{head}.{body}.{}", URL_SAFE.encode(&raw))),
        ("padding of the header", format!("{head}=.{body}.{signature}")),
        ("two tokens by a comma", format!("{good},{good}")),
        (
            "JSON serialization",
            json!({"protected": head, "payload": body, "signature": signature}).to_string(),
        ),
        ("percent-encoded dot", good.replacen('.', "%2e", 1)),
        ("full width dot", good.replacen('.', "．", 1)),
        ("not ASCII", good.replacen('e', "é", 1)),
    ] {
        add(name, token, Reason::Malformed);
    }
    // 0xfb 0xff encodes to "+/8" in the standard alphabet and "-_8" in the one of URLs.
    let standard = format!("{message}.{}", STANDARD.encode([0xfb; 64]).trim_end_matches('='));
    add("standard alphabet", standard, Reason::Malformed);
    let last = if signature.ends_with('A') { 'B' } else { char::from(signature.as_bytes()[85] + 1) };
    add("signature with spare bits set", format!("{message}.{}{last}", &signature[..85]), Reason::Signature);
    add("header with spare bits set", format!("eyJ9.{body}.{signature}"), Reason::Header);
    add(
        "impossible length of base64",
        format!("{head}A.{body}.{signature}"),
        if head.len() % 4 == 0 { Reason::Malformed } else { Reason::Header },
    );
    add(
        "too long by one",
        format!("{message}.{}", "A".repeat(verify::TOKEN_BYTES + 1 - message.len() - 1)),
        Reason::TooLong,
    );
    add("much too long", "A.".repeat(1 << 20), Reason::TooLong);
    add("good but for its size", keys.claiming("x", json!("x".repeat(4096))), Reason::TooLong);

    // JSON.
    for (name, text) in [
        ("no JSON", &b"hello"[..]),
        ("an array", br#"[{"iss":"agentd"}]"#),
        ("a string", br#""agentd""#),
        ("null", b"null"),
        ("a number", b"1"),
        ("two objects", b"{}{}"),
        ("broken off", br#"{"iss":"agentd""#),
        ("bare names", b"{iss:1}"),
        ("a comment", br#"{"iss":"agentd"/**/}"#),
        ("not UTF-8", b"{\"iss\":\"\xff\"}"),
        ("an overlong dot", b"{\"iss\":\"\xc0\xae\"}"),
        ("half a surrogate", br#"{"iss":"\ud800"}"#),
    ] {
        add(&format!("claims are {name}"), keys.sign(Signer::Ed, ed().to_string(), text), Reason::Claims);
        add(&format!("header is {name}"), keys.sign(Signer::Ed, text, claims().to_string()), Reason::Header);
    }
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<_>>();
    add(
        "claims in UTF-16",
        keys.sign(Signer::Ed, ed().to_string(), utf16(&claims().to_string())),
        Reason::Claims,
    );
    add(
        "claims after a byte order mark",
        keys.sign(Signer::Ed, ed().to_string(), format!("\u{feff}{}", claims())),
        Reason::Claims,
    );
    add(
        "header in UTF-16",
        keys.sign(Signer::Ed, utf16(&ed().to_string()), claims().to_string()),
        Reason::Header,
    );
    let deep = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    add("claims nested 1000 deep", keys.claiming_raw(&format!(r#","x":{}"#, deep(1000))), Reason::Claims);
    add(
        "header nested 1000 deep",
        keys.sign(Signer::Ed, format!(r#"{{"alg":"EdDSA","kid":"ed","x":{}}}"#, deep(1000)), "{}"),
        Reason::Header,
    );
    for name in ["exp", "iss", "aud", "sub", "tunnels", "nbf", "jti"] {
        let value = &claims()[name];
        add(&format!("{name} twice"), keys.claiming_raw(&format!(r#","{name}":{value}"#)), Reason::Claims);
    }
    add("sub twice by an escape", keys.claiming_raw(r#","\u0073ub":"admin""#), Reason::Claims);
    add("a duplicate deep inside", keys.claiming_raw(r#","x":[{"a":1,"a":2}]"#), Reason::Claims);

    // Times.
    add("exp missing", keys.claiming("exp", None), Reason::Expiry);
    for exp in [json!(null), json!((NOW + 60).to_string()), json!({}), json!(true), json!(-1)] {
        add(&format!("exp {exp}"), keys.claiming("exp", exp.clone()), Reason::Expiry);
    }
    for exp in [
        "1.8e9",
        "1800003600.5",
        "1e400",
        "-1800003600",
        "18446744073709551616",
        "9".repeat(400).as_str(),
        "NaN",
        "Infinity",
    ] {
        let claims = claims().to_string().replace(&(NOW + 3600).to_string(), exp);
        let reason = if ["1e400", "NaN", "Infinity"].contains(&exp) || exp.len() == 400 {
            Reason::Claims
        } else {
            Reason::Expiry
        };
        add(
            &format!("exp {}", &exp[..exp.len().min(24)]),
            keys.sign(Signer::Ed, ed().to_string(), claims),
            reason,
        );
    }
    add("exp of 2^64 - 1", keys.claiming("exp", json!(u64::MAX)), Reason::Expiry);
    add("exp in 100 years", keys.claiming("exp", json!(NOW + 100 * 365 * 86400)), Reason::Expiry);
    add("exp in milliseconds", keys.claiming("exp", json!((NOW + 3600) * 1000)), Reason::Expiry);
    add(
        "exp one past the longest life",
        keys.claiming("exp", json!(NOW + LIFETIME.as_secs() + 1)),
        Reason::Expiry,
    );
    for (name, exp) in [
        ("0", 0),
        ("a year ago", NOW - 365 * 86400),
        ("past the skew", NOW - SKEW_SECS),
        ("one more past the skew", NOW - SKEW_SECS - 1),
    ] {
        add(&format!("exp {name}"), keys.claiming("exp", json!(exp)), Reason::Expired);
    }
    for name in ["nbf", "iat"] {
        for value in [
            json!(NOW + SKEW_SECS + 1),
            json!(NOW + 3600),
            json!(u64::MAX),
            json!(NOW.to_string()),
            json!(1.5),
            json!(-1),
            json!(null),
        ] {
            add(&format!("{name} {value}"), keys.claiming(name, value.clone()), Reason::NotYet);
        }
    }

    // Issuer and audience.
    add("iss missing", keys.claiming("iss", None), Reason::Issuer);
    for iss in [
        json!("https://mallory.example"),
        json!("Agentd"),
        json!("agentd "),
        json!("agentd/"),
        json!(""),
        json!(["agentd"]),
        json!(["agentd", "x"]),
        json!(null),
        json!({"agentd": 1}),
        json!("agentd\u{0}"),
    ] {
        add(&format!("iss {iss}"), keys.claiming("iss", iss.clone()), Reason::Issuer);
    }
    add("aud missing", keys.claiming("aud", None), Reason::Audience);
    for aud in [
        json!("other"),
        json!("Tunnel"),
        json!("tunnel "),
        json!("tunnel,other"),
        json!(""),
        json!([]),
        json!(["other"]),
        json!([["tunnel"]]),
        json!(null),
        json!({"tunnel": true}),
        json!(["tunnel", 1]),
    ] {
        add(&format!("aud {aud}"), keys.claiming("aud", aud.clone()), Reason::Audience);
    }

    // Owners.
    add("owner missing", keys.claiming("sub", None), Reason::Owner);
    for owner in [
        json!(""),
        json!("acme\nadmin"),
        json!("acme\r\nx: y"),
        json!("a b"),
        json!("acme\u{0}"),
        json!("\u{1b}[31m"),
        json!("äcme"),
        json!(7),
        json!(null),
        json!("a".repeat(129)),
        json!("acme\u{2028}"),
    ] {
        add(&format!("owner {owner}"), keys.claiming("sub", owner.clone()), Reason::Owner);
    }
    // A list where one value belongs is already too much for the library.
    for (name, value) in [("exp", json!([NOW + 60])), ("nbf", json!([NOW])), ("sub", json!(["acme"]))] {
        add(&format!("{name} in a list"), keys.claiming(name, value), Reason::Claims);
    }

    // Tunnels.
    add("tunnels missing", keys.claiming("tunnels", None), Reason::Tunnels);
    for tunnels in [
        json!([]),
        json!("web"),
        json!("*"),
        json!({"web": true}),
        json!(null),
        json!([["web"]]),
        json!([1]),
        json!([null]),
        json!(["web", 1]),
        json!([""]),
        json!(["**"]),
        json!(["*web"]),
        json!(["w*b"]),
        json!(["web*"]),
        json!(["pr-**"]),
        json!(["-*"]),
        json!(["*-"]),
        json!(["Web"]),
        json!(["WEB-*"]),
        json!(["www"]),
        json!(["api"]),
        json!(["admin"]),
        json!(["xn--bcher-kva"]),
        json!(["xn--*"]),
        json!(["_acme-challenge"]),
        json!(["_*"]),
        json!(["web,admin"]),
        json!(["web,*"]),
        json!([","]),
        json!(["web."]),
        json!(["a.b"]),
        json!(["web\n"]),
        json!([" web"]),
        json!(["?"]),
        json!([".*"]),
        json!(["web\u{0}"]),
        json!(["wеb"]),
        json!(["a".repeat(64)]),
        json!(["web", "*web"]),
        json!((0..101).map(|n| format!("t{n}")).collect::<Vec<_>>()),
    ] {
        let shown = tunnels.to_string();
        add(
            &format!("tunnels {}", &shown[..shown.len().min(40)]),
            keys.claiming("tunnels", tunnels),
            Reason::Tunnels,
        );
    }

    // Ids and revocation.
    for id in [
        json!(""),
        json!(1),
        json!(null),
        json!(["t1"]),
        json!("a b"),
        json!("a\nb"),
        json!("x".repeat(129)),
        json!("stolen\u{0}"),
    ] {
        add(&format!("jti {id}"), keys.claiming("jti", id.clone()), Reason::TokenId);
    }
    add("a revoked token", keys.claiming("jti", json!("stolen")), Reason::Revoked);
    add("a revoked owner", keys.claiming("sub", json!("mallory")), Reason::Revoked);
    let owner_without_id = with(claims(), "sub", json!("mallory"));
    add(
        "a revoked owner by another algorithm",
        keys.sign(Signer::Es, header("ES256", "es").to_string(), owner_without_id.to_string()),
        Reason::Revoked,
    );
    all
}
