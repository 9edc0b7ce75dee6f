//! The credential of a connection request: the event enters, one token leaves, or none.
//!
//! `Authorization: Bearer …` is the way. The query parameter `token` is for clients that cannot set
//! a header, and is only looked at when there is no such header: what stands in a URL ends up in logs
//! and histories. Names of header fields are compared without case, as API Gateway passes them on
//! as they were sent.

use aws_lambda_events::apigw::ApiGatewayCustomAuthorizerRequestTypeRequest as Event;

use crate::verify::Reason;

const QUERY_PARAMETER: &str = "token";

/// The token that the event brings; `None` when it brings no credential of any kind.
///
/// # Errors
///
/// The [`Reason`] why what it brings cannot be a token.
pub(crate) fn token(event: &Event) -> Result<Option<&str>, Reason> {
    let fields = [&event.multi_value_headers, &event.headers];
    let mut values = fields.into_iter().find_map(|fields| {
        let mut values = fields.get_all("authorization").iter().peekable();
        values.peek().is_some().then_some(values)
    });
    if let Some(values) = &mut values {
        let value = values.next().ok_or(Reason::Scheme)?;
        if values.next().is_some() {
            return Err(Reason::Ambiguous);
        }
        return bearer(value.to_str().map_err(|_| Reason::Scheme)?).map(Some);
    }
    let parameters = [&event.multi_value_query_string_parameters, &event.query_string_parameters];
    match parameters.into_iter().find_map(|parameters| parameters.all(QUERY_PARAMETER)).as_deref() {
        None => Ok(None),
        Some([token]) => Ok(Some(token)),
        Some(_) => Err(Reason::Ambiguous),
    }
}

/// The token of `Bearer token` (RFC 6750 §2.1); the scheme is compared without case (RFC 9110 §11.1).
fn bearer(value: &str) -> Result<&str, Reason> {
    let (scheme, token) = value.trim_matches([' ', '\t']).split_once(' ').ok_or(Reason::Scheme)?;
    let token = token.trim_start_matches(' ');
    if scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() { Ok(token) } else { Err(Reason::Scheme) }
}
