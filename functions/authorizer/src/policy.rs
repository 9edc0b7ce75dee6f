//! The answer to API Gateway: an identity enters, an IAM policy with a context leaves.
//!
//! It stays far below the 8 KB that API Gateway takes (API Gateway Developer Guide, "WebSocket
//! quotas"): all of its variable content comes out of a token of at most 4 KB.

use aws_lambda_events::{
    apigw::{ApiGatewayCustomAuthorizerPolicy, ApiGatewayV2CustomAuthorizerIamPolicyResponse},
    iam::{IamPolicyEffect, IamPolicyStatement},
};
use serde::{Deserialize, Serialize};

use crate::verify::Identity;

/// The principal of everybody who is refused.
const NOBODY: &str = "nobody";

/// What the other functions find in the request context of every event of the connection. API
/// Gateway hands every value on as a string.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Who opened the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Which tunnels it may open, separated by commas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnels: Option<String>,
    /// When its token ends, in Unix time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_expires: Option<u64>,
    /// The id of its token, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_id: Option<String>,
}

/// The answer of an authorizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Policy(pub ApiGatewayV2CustomAuthorizerIamPolicyResponse<Context>);

impl Policy {
    pub(crate) fn allow(arn: &str, identity: &Identity) -> Self {
        let context = Context {
            owner: Some(identity.owner.to_string()),
            tunnels: Some(identity.tunnels.to_string()),
            token_expires: Some(identity.expires_at),
            token_id: identity.token_id.clone(),
        };
        Self::new(IamPolicyEffect::Allow, arn, identity.owner.as_str(), context)
    }

    pub(crate) fn deny(arn: Option<&str>) -> Self {
        Self::new(IamPolicyEffect::Deny, arn.unwrap_or("*"), NOBODY, Context::default())
    }

    /// Whether it lets the agent in.
    #[must_use]
    pub fn is_allow(&self) -> bool {
        self.0.policy_document.statement.iter().all(|statement| statement.effect == IamPolicyEffect::Allow)
    }

    fn new(effect: IamPolicyEffect, arn: &str, principal: &str, context: Context) -> Self {
        let mut statement = IamPolicyStatement::default();
        statement.action = vec!["execute-api:Invoke".into()];
        statement.effect = effect;
        statement.resource = vec![arn.into()];
        let mut document = ApiGatewayCustomAuthorizerPolicy::default();
        document.version = Some("2012-10-17".into());
        document.statement = vec![statement];
        let mut answer = ApiGatewayV2CustomAuthorizerIamPolicyResponse::default();
        answer.principal_id = Some(principal.into());
        answer.policy_document = document;
        answer.context = context;
        Self(answer)
    }
}
