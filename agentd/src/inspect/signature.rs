//! When a webhook was signed: one that is sent again later than its scheme allows is refused by what checks it.

use crate::capture::fields::Fields;

/// What a signature says about time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Signed {
    pub(crate) scheme: &'static str,
    /// Unix seconds.
    pub(crate) at: u64,
    /// How old the vendor's libraries let it be.
    pub(crate) tolerance_s: u64,
}

/// Each scheme that signs a time: the fields that must be there, the one with the time, and the vendor's tolerance.
const SCHEMES: [(&str, &str, &str, u64); 5] = [
    ("standard-webhooks", "webhook-signature", "webhook-timestamp", 300),
    ("svix", "svix-signature", "svix-timestamp", 300),
    ("slack", "x-slack-signature", "x-slack-request-timestamp", 300),
    ("stripe", "stripe-signature", "stripe-signature", 300),
    ("paddle", "paddle-signature", "paddle-signature", 5),
];

/// When the request was signed, if it is signed by a scheme that says so.
pub(crate) fn signed(fields: &Fields) -> Option<Signed> {
    SCHEMES.iter().find_map(|&(scheme, signature, time, tolerance_s)| {
        fields.get(signature)?;
        let text = fields.text(time)?;
        let at = match scheme {
            // t=1492774577,v1=…; Paddle's has semicolons and ts.
            "stripe" => text.split(',').find_map(|part| part.trim().strip_prefix("t="))?,
            "paddle" => text.split(';').find_map(|part| part.trim().strip_prefix("ts="))?,
            _ => text,
        };
        Some(Signed { scheme, at: at.trim().parse().ok()?, tolerance_s })
    })
}

impl Signed {
    /// Whether its libraries refuse it at `now`, in Unix seconds.
    pub(crate) const fn is_too_old(&self, now: u64) -> bool {
        now > self.at.saturating_add(self.tolerance_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_found_in_each_scheme() {
        for (pairs, wanted) in [
            (&[("webhook-signature", "v1,x"), ("webhook-timestamp", "1000")][..], Some("standard-webhooks")),
            (&[("svix-signature", "v1,x"), ("svix-timestamp", "1000")], Some("svix")),
            (&[("x-slack-signature", "v0=x"), ("x-slack-request-timestamp", "1000")], Some("slack")),
            (&[("Stripe-Signature", "t=1000, v1=x")], Some("stripe")),
            (&[("paddle-signature", "ts=1000;h1=x")], Some("paddle")),
            (&[("x-hub-signature-256", "sha256=x")], None),
            (&[("webhook-timestamp", "1000")], None),
            (&[("stripe-signature", "t=x")], None),
        ] {
            let fields = Fields::from_pairs(pairs.iter().map(|(name, value)| (*name, value.as_bytes())));
            let found = signed(&fields);
            assert_eq!(found.as_ref().map(|signed| (signed.scheme, signed.at)), wanted.map(|it| (it, 1000)));
        }
        let signed = Signed { scheme: "stripe", at: 1000, tolerance_s: 300 };
        assert!(!signed.is_too_old(1300) && signed.is_too_old(1301));
    }
}
