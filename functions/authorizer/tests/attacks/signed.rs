//! Tokens, well and badly signed, and the events that carry them.

use super::*;

pub(crate) const NOW: u64 = 1_800_000_000;
pub(crate) const SKEW_SECS: u64 = SKEW.as_secs();
pub(crate) const SECRET: [u8; 32] = [0x5a; 32];
pub(crate) const ARN: &str = "arn:aws:execute-api:eu-central-1:123456789012:abcdef1234/dev/$connect";

pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Who signs, and the public halves as their owner would publish them.
pub(crate) struct Keys {
    pub(crate) ed: Ed25519KeyPair,
    pub(crate) es: EcdsaKeyPair,
    pub(crate) rs: RsaKeyPair,
}

#[derive(Clone, Copy)]
pub(crate) enum Signer {
    Ed,
    Es,
    Rs,
    Ps,
    Hs,
}

impl Keys {
    pub(crate) fn new() -> Self {
        Self {
            ed: Ed25519KeyPair::generate().unwrap(),
            es: EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap(),
            rs: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
        }
    }

    pub(crate) fn jwk(&self, signer: Signer, id: &str) -> Value {
        match signer {
            Signer::Ed => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": id, "x": encode(self.ed.public_key())})
            }
            Signer::Es => {
                let (x, y) = self.es.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "crv": "P-256", "kid": id, "x": encode(x), "y": encode(y), "alg": "ES256"})
            }
            Signer::Rs | Signer::Ps => {
                let public = self.rs.public_key();
                let n = encode(public.modulus().big_endian_without_leading_zero());
                let e = encode(public.exponent().big_endian_without_leading_zero());
                json!({"kty": "RSA", "kid": id, "n": n, "e": e, "use": "sig"})
            }
            Signer::Hs => json!({"kty": "oct", "kid": id, "k": encode(SECRET)}),
        }
    }

    pub(crate) fn jwks(&self) -> String {
        let keys = [(Signer::Ed, "ed"), (Signer::Es, "es"), (Signer::Rs, "rs")];
        json!({"keys": keys.map(|(signer, id)| self.jwk(signer, id))}).to_string()
    }

    pub(crate) fn signature(&self, signer: Signer, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match signer {
            Signer::Ed => self.ed.sign(message).as_ref().to_vec(),
            Signer::Es => self.es.sign(&random, message).unwrap().as_ref().to_vec(),
            Signer::Rs | Signer::Ps => {
                let scheme = if matches!(signer, Signer::Rs) { &RSA_PKCS1_SHA256 } else { &RSA_PSS_SHA256 };
                let mut signature = vec![0; self.rs.public_modulus_len()];
                self.rs.sign(scheme, &random, message, &mut signature).unwrap();
                signature
            }
            Signer::Hs => mac(&SECRET, message),
        }
    }

    /// A token of these very bytes.
    pub(crate) fn sign(&self, signer: Signer, header: impl AsRef<[u8]>, claims: impl AsRef<[u8]>) -> String {
        let message = format!("{}.{}", encode(header), encode(claims));
        format!("{message}.{}", encode(self.signature(signer, message.as_bytes())))
    }

    /// A token with good claims under this header.
    pub(crate) fn headed(&self, signer: Signer, header: &Value) -> String {
        self.sign(signer, header.to_string(), claims().to_string())
    }

    /// A token with good claims but for `name`, which becomes `value` or goes.
    pub(crate) fn claiming(&self, name: &str, value: impl Into<Option<Value>>) -> String {
        let mut claims = claims();
        match value.into() {
            Some(value) => claims[name] = value,
            None => drop(claims.as_object_mut().unwrap().remove(name)),
        }
        self.sign(Signer::Ed, header("EdDSA", "ed").to_string(), claims.to_string())
    }

    /// A good token whose claims end in `extra`, before the last brace.
    pub(crate) fn claiming_raw(&self, extra: &str) -> String {
        let claims = claims().to_string();
        let claims = format!("{}{extra}}}", claims.strip_suffix('}').unwrap());
        self.sign(Signer::Ed, header("EdDSA", "ed").to_string(), claims)
    }

    pub(crate) fn good(&self) -> String {
        self.headed(Signer::Ed, &header("EdDSA", "ed"))
    }
}

pub(crate) fn mac(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

pub(crate) fn header(algorithm: &str, key_id: &str) -> Value {
    json!({"alg": algorithm, "typ": "JWT", "kid": key_id})
}

pub(crate) fn with(mut object: Value, name: &str, value: Value) -> Value {
    object[name] = value;
    object
}

pub(crate) fn claims() -> Value {
    json!({
        "iss": "agentd", "aud": "tunnel", "sub": "acme", "tunnels": ["web", "pr-*"],
        "iat": NOW, "nbf": NOW, "exp": NOW + 3600, "jti": "t1",
    })
}

pub(crate) fn rules() -> Rules {
    Rules {
        issuer: "agentd".into(),
        audience: "tunnel".into(),
        owner_claim: "sub".into(),
        revoked: Revoked {
            token_ids: ["stolen".to_owned()].into(),
            owners: ["mallory".parse().unwrap()].into(),
        },
    }
}

pub(crate) fn key_set(keys: &Keys) -> KeySet {
    let mut set = KeySet::from_jwks(keys.jwks().as_bytes()).unwrap();
    set.add_secret(&STANDARD.encode(SECRET)).unwrap();
    set
}

pub(crate) fn verify_at(token: &str, set: &KeySet, now: u64) -> Result<Identity, Reason> {
    let token = verify::parse(token)?;
    let key = set.get(token.key_id()).ok_or(Reason::UnknownKey)?;
    token.verify(key, &rules(), now).map_err(|refusal| refusal.reason)
}

pub(crate) fn configured(lookup: impl Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    Config::from_env(&Env::new(&lookup))
}

pub(crate) fn authorizer(jwks: &str) -> Authorizer {
    Authorizer::new(configured(|name| match name {
        "TUNNEL_JWKS" => Some(jwks.to_owned()),
        "TUNNEL_HS256_SECRET" => Some(STANDARD.encode(SECRET)),
        "TUNNEL_REVOKED" => Some(r#"{"token_ids":["stolen"],"owners":["mallory"]}"#.into()),
        _ => None,
    }))
}

/// What API Gateway sends for `$connect`, as far as it matters here.
pub(crate) fn event(fields: &[(&str, &str)], query: &[(&str, &str)]) -> String {
    let several = |pairs: &[(&str, &str)]| {
        let mut object = serde_json::Map::new();
        for (name, value) in pairs {
            let values = object.entry(*name).or_insert_with(|| json!([]));
            values.as_array_mut().unwrap().push(json!(value));
        }
        Value::Object(object)
    };
    let single = |pairs: &[(&str, &str)]| {
        Value::Object(pairs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect())
    };
    json!({
        "type": "REQUEST", "methodArn": ARN,
        "headers": single(fields), "multiValueHeaders": several(fields),
        "queryStringParameters": single(query), "multiValueQueryStringParameters": several(query),
        "requestContext": {
            "apiId": "abcdef1234", "connectedAt": 1, "connectionId": "L0SM9cOFvHcCIhw=", "eventType": "CONNECT",
            "identity": {"sourceIp": "192.0.2.1"}, "requestId": "r", "routeKey": "$connect", "stage": "dev",
        },
    })
    .to_string()
}

pub(crate) fn bearing(token: &str) -> String {
    event(&[("Authorization", &format!("Bearer {token}"))], &[])
}

pub(crate) async fn answer(authorizer: &Authorizer, event: &str) -> String {
    let policy = authorizer.answer(event, NOW).await.unwrap();
    serde_json::to_string(&policy).unwrap()
}

pub(crate) const DENIED: &str = concat!(
    r#"{"principalId":"nobody","policyDocument":{"Version":"2012-10-17","Statement":[{"Action":["execute-api:Invoke"],"#,
    r#""Effect":"Deny","Resource":["arn:aws:execute-api:eu-central-1:123456789012:abcdef1234/dev/$connect"]}]},"context":{}}"#
);
