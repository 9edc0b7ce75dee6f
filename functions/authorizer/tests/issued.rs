//! What `agentd keys new` and `agentd token issue` made once is accepted as it is.
//!
//! The private keys of these files were thrown away; the tokens end with the quarter they are for.

use authorizer::{
    config::Config,
    key::KeySet,
    verify::{self, Reason, Revoked, Rules},
};
use edge::config::Env;

const ISSUED_AT: u64 = 1_795_407_882;
const EXPIRES_AT: u64 = ISSUED_AT + 90 * 24 * 60 * 60;

#[test]
fn tokens_of_agentd_are_accepted_with_the_default_rules() {
    let rules = Rules {
        issuer: authorizer::config::DEFAULT_TOKEN_ISSUER.into(),
        audience: authorizer::config::DEFAULT_TOKEN_AUDIENCE.into(),
        owner_claim: authorizer::config::DEFAULT_OWNER_CLAIM.into(),
        revoked: Revoked::default(),
    };
    for (jwks, token) in [
        (include_str!("fixtures/agentd-ed.jwks.json"), include_str!("fixtures/agentd-ed.token")),
        (include_str!("fixtures/agentd-es.jwks.json"), include_str!("fixtures/agentd-es.token")),
    ] {
        let keys = KeySet::from_jwks(jwks.as_bytes()).unwrap();
        let token = verify::parse(token.trim_end()).unwrap();
        let verify_at = |now| token.verify(keys.get(token.key_id()).unwrap(), &rules, now);
        let identity = verify_at(ISSUED_AT).unwrap();
        assert_eq!((identity.owner.as_str(), identity.tunnels.to_string().as_str()), ("acme", "web,pr-*"));
        assert_eq!(identity.expires_at, EXPIRES_AT);
        assert!(identity.token_id.is_some());
        assert_eq!(verify_at(EXPIRES_AT + 30).unwrap_err().reason, Reason::Expired);
        let environment = |name: &str| (name == "TUNNEL_JWKS").then(|| jwks.to_owned());
        assert!(Config::from_env(&Env::new(&environment)).is_ok());
    }
}
