//! Refusals that are known to come from the tunnel's settings, and the one setting that helps. Pure.
//!
//! Enters: the head of an error that the upstream answered with, what of its body was there with it, and what the
//! request said of its origin. Leaves: a [`Hint`]. Only errors are looked at.
//!
//! Each entry is an answer that was seen; `docs/apps.md` has the recipes.

use std::sync::atomic::{AtomicU64, Ordering};

/// No more of a body is looked at.
const BODY_BYTES: usize = 8 * 1024;

/// An answer that is looked at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refusal<'a> {
    pub(crate) status: u16,
    /// The bytes of the body that were there with the head.
    pub(crate) body: &'a [u8],
    /// Whether the request came from a page of the tunnel, and the upstream was told another host.
    pub(crate) own_page: bool,
}

/// What helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hint {
    /// What happened, in half a sentence.
    pub(crate) refusal: &'static str,
    /// What to set.
    pub(crate) advice: &'static str,
}

/// What a refusal is known by: one of the statuses and one of the texts.
struct Known {
    statuses: &'static [u16],
    texts: &'static [&'static str],
    hint: Hint,
}

const HOST: &str = "--host-header upstream (host_header = \"upstream\"), or allow the public name in the app";
const ORIGIN: &str = "--origin upstream (origin = \"upstream\"), or allow the public origin in the app";

const KNOWN: &[Known] = &[
    Known {
        statuses: &[403],
        // Vite and what is built on it, Angular.
        texts: &["Blocked request. This host ("],
        hint: Hint {
            refusal: "the dev server refuses the public host name",
            advice: "--host-header upstream (host_header = \"upstream\"), or server.allowedHosts of the dev server",
        },
    },
    Known {
        statuses: &[403],
        // webpack-dev-server, Storybook, Rails, the MCP SDK.
        texts: &["Invalid Host header", "Invalid host", "Blocked host", "Invalid Host: "],
        hint: Hint { refusal: "the app refuses the host name it is asked for", advice: HOST },
    },
    Known {
        // The MCP SDK for Python, Django, HTTP.sys.
        statuses: &[400, 421],
        texts: &["Invalid Host header", "Invalid HTTP_HOST header", "Bad Request - Invalid Hostname"],
        hint: Hint { refusal: "the app refuses the host name it is asked for", advice: HOST },
    },
    Known {
        statuses: &[403],
        // Astro, SvelteKit.
        texts: &["Cross-site POST form submissions are forbidden"],
        hint: Hint {
            refusal: "the app takes the form for one of a foreign site",
            advice: "--origin upstream (origin = \"upstream\"); a built SvelteKit: PROTOCOL_HEADER=x-forwarded-proto \
                     HOST_HEADER=x-forwarded-host",
        },
    },
    Known {
        statuses: &[403],
        texts: &["CSRF verification failed", "Origin checking failed"],
        hint: Hint {
            refusal: "Django does not trust the page's origin",
            advice: "--origin upstream (origin = \"upstream\"), or CSRF_TRUSTED_ORIGINS",
        },
    },
    Known {
        statuses: &[403],
        // The MCP SDKs; Storybook's channel.
        texts: &["Invalid Origin"],
        hint: Hint { refusal: "the app refuses the page's origin", advice: ORIGIN },
    },
    Known {
        statuses: &[422],
        // Rails.
        texts: &["ActionController::InvalidAuthenticityToken", "didn't match request.base_url"],
        hint: Hint { refusal: "Rails takes the form for one of a foreign site", advice: ORIGIN },
    },
    Known {
        statuses: &[404],
        // Its pages carry the title; the reason is in its log only.
        texts: &["<title>Jupyter Server</title>", "Blocking Cross Origin API request"],
        hint: Hint {
            refusal: "Jupyter may have taken the page for one of a foreign site",
            advice: "--origin upstream (origin = \"upstream\"), or host_header = \"preserve\" with allow_remote_access",
        },
    },
    Known {
        statuses: &[500],
        texts: &["Invalid Server Actions request."],
        hint: Hint {
            refusal: "Next.js takes the Server Action for one of a foreign site",
            advice: "--origin preserve (origin = \"preserve\"), or serverActions.allowedOrigins",
        },
    },
    Known {
        statuses: &[400],
        // nginx, Go.
        texts: &[
            "The plain HTTP request was sent to HTTPS port",
            "Client sent an HTTP request to an HTTPS server",
        ],
        hint: Hint { refusal: "the upstream speaks TLS there", advice: "name it as https://HOST:PORT" },
    },
];

/// Where no text is known, but a page of the tunnel was refused and the app was told another host than the page
/// comes from.
const OWN_PAGE: Hint = Hint {
    refusal: "the app refuses a page of its own, maybe because its Origin is the public one and Host is not",
    advice: "--origin upstream (origin = \"upstream\"), or --host-header preserve",
};

/// What dev servers say as the first message of a WebSocket instead of refusing it, and its place.
const FIRST_MESSAGE: (u32, &str, Hint) = (
    61,
    // webpack-dev-server.
    "Invalid Host/Origin header",
    Hint {
        refusal: "the dev server refuses the host name or the page's origin, and says so over the WebSocket only",
        advice: "--host-header upstream (host_header = \"upstream\") without --origin preserve, or allowedHosts of the \
                 dev server",
    },
);

/// What an upgrade of a page was answered with that is no HTTP, and its place: Next writes the bytes `Unauthorized`.
pub(crate) const NO_HTTP: (u32, Hint) = (
    62,
    Hint {
        refusal: "the dev server answered a page's WebSocket with something that is not HTTP, as Next.js does to origins it \
                  does not know",
        advice: "leave origin as it is, or --origin upstream (origin = \"upstream\"), or allowedDevOrigins of Next.js",
    },
);

/// No message that is longer is looked at.
const MESSAGE_BYTES: usize = 256;

/// Which setting would have helped, if the first message of a WebSocket is a known refusal; and its place.
pub(crate) fn recognise_message(text: &str) -> Option<(u32, Hint)> {
    let (place, says, hint) = FIRST_MESSAGE;
    (text.len() <= MESSAGE_BYTES && text.contains(says)).then_some((place, hint))
}

/// The statuses with which [`OWN_PAGE`] is worth a line.
const OWN_PAGE_STATUSES: &[u16] = &[403, 421];

/// Which setting would have helped, if the refusal is a known one; and its place among all, for [`Given`].
pub(crate) fn recognise(refusal: &Refusal<'_>) -> Option<(u32, Hint)> {
    if refusal.status < 400 {
        return None;
    }
    let body = &refusal.body[..refusal.body.len().min(BODY_BYTES)];
    let says = |text: &str| body.windows(text.len()).any(|window| window == text.as_bytes());
    let known = KNOWN.iter().zip(0..).find(|(known, _)| {
        known.statuses.contains(&refusal.status) && known.texts.iter().any(|text| says(text))
    });
    match known {
        // Only a page can be told from a page that is not there.
        Some((known, _)) if known.statuses == [404] && !refusal.own_page => None,
        Some((known, at)) => Some((at, known.hint)),
        None if refusal.own_page && OWN_PAGE_STATUSES.contains(&refusal.status) => Some((63, OWN_PAGE)),
        None => None,
    }
}

/// Which hints a tunnel has been given: each is given once.
#[derive(Debug, Default)]
pub(crate) struct Given(AtomicU64);

impl Given {
    /// Whether the hint at this place is given for the first time.
    pub(crate) fn first(&self, place: u32) -> bool {
        let bit = 1 << place.min(63);
        self.0.fetch_or(bit, Ordering::Relaxed) & bit == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(status: u16, body: &str, own_page: bool) -> Option<&'static str> {
        recognise(&Refusal { status, body: body.as_bytes(), own_page }).map(|(_, hint)| hint.advice)
    }

    #[test]
    fn refusals_that_were_seen_are_recognised() {
        for (status, body, flag) in [
            (
                403,
                "Blocked request. This host (\"web.example.com\") is not allowed.",
                "--host-header upstream",
            ),
            (403, "Invalid Host header", "--host-header upstream"),
            (403, "Invalid host", "--host-header upstream"),
            (
                403,
                r#"{"jsonrpc":"2.0","error":{"code":-32000,"message":"Invalid Host: h"}}"#,
                "--host-header upstream",
            ),
            (421, "Invalid Host header", "--host-header upstream"),
            (400, "<title>DisallowedHost</title>Invalid HTTP_HOST header: 'h'.", "--host-header upstream"),
            (403, "Cross-site POST form submissions are forbidden", "--origin upstream"),
            (403, "<p>CSRF verification failed. Request aborted.</p>", "--origin upstream"),
            (403, r#"{"error":{"code":-32000,"message":"Invalid Origin: h"}}"#, "--origin upstream"),
            (403, "Invalid Origin header", "--origin upstream"),
            (500, "Invalid Server Actions request.", "--origin preserve"),
            (400, "<center>The plain HTTP request was sent to HTTPS port</center>", "https://"),
        ] {
            assert!(advice(status, body, false).is_some_and(|advice| advice.contains(flag)), "{body}");
        }
    }

    #[test]
    fn what_only_looks_alike_is_left_alone() {
        for (status, body) in [
            (200, "Invalid Host header"),
            (404, "Invalid Host header"),
            (403, "forbidden"),
            (403, ""),
            (404, "<title>Jupyter Server</title>"),
            (500, "oops"),
        ] {
            assert_eq!(advice(status, body, false), None, "{status} {body}");
        }
        let far = format!("{}Invalid Host header", " ".repeat(BODY_BYTES));
        assert_eq!(advice(403, &far, false), None);
        assert!(advice(403, &far[19..], false).is_some());
    }

    #[test]
    fn a_page_that_was_refused_without_a_word_gets_a_guess() {
        assert!(advice(403, "", true).is_some_and(|advice| advice.contains("--origin upstream")));
        assert!(advice(404, "<title>Jupyter Server</title>", true).is_some());
        assert_eq!(advice(404, "", true), None);
        assert_eq!(advice(401, "", true), None);
    }

    #[test]
    fn a_refusal_in_the_first_message_is_recognised_and_nothing_longer() {
        let said = r#"{"type":"error","data":"Invalid Host/Origin header"}"#;
        assert!(recognise_message(said).is_some_and(|(_, hint)| hint.advice.contains("allowedHosts")));
        assert!(recognise_message(r#"{"type":"hot"}"#).is_none());
        for (more, is_known) in [(MESSAGE_BYTES - said.len(), true), (MESSAGE_BYTES - said.len() + 1, false)]
        {
            assert_eq!(recognise_message(&format!("{said}{}", " ".repeat(more))).is_some(), is_known);
        }
    }

    #[test]
    fn each_hint_is_given_once() {
        assert!(KNOWN.len() < 61);
        let given = Given::default();
        assert!(given.first(0) && given.first(63) && given.first(5));
        assert!(!given.first(0) && !given.first(63) && !given.first(5));
    }
}
