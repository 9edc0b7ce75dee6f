//! What the fronts of AWS do to traffic, as evidence has it: one table, and the choice of a front.
//!
//! Enters the front that is imitated and which of its behaviours are relaxed; leaves, for each behaviour, whether it is
//! to be imitated. Where evidence is unsure, the worse reading is what is imitated: what works here then works in an
//! account too. `docs/aws-fronts.md` has the same list for people; a test holds one against the other.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use clap::ValueEnum;
use proto::limits;

use crate::clock::Clock;

/// What stands between the public and `ingress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Kind {
    /// The Function URL itself.
    #[default]
    None,
    /// CloudFront before the Function URL.
    #[value(name = "cloudfront")]
    CloudFront,
    /// API Gateway's HTTP API before the Function URL.
    #[value(name = "httpapi")]
    HttpApi,
    /// CloudFront before `relay`, which takes every request.
    Relay,
    /// Nothing of AWS: what goes in comes out, to the byte. For tests of the exchange itself.
    Direct,
}

impl Kind {
    /// The front's name, as `--front` and the parameter `front` take it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::CloudFront => "cloudfront",
            Self::HttpApi => "httpapi",
            Self::Relay => "relay",
            Self::Direct => "direct",
        }
    }
}

/// How sure it is that AWS does this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confidence {
    /// AWS's own text says so.
    Documented,
    /// Several independent public reports, or a capture.
    Reported,
    /// It follows from something else, or nobody says anything: the worse reading.
    Assumed,
}

/// One thing that a front does.
#[derive(Debug)]
pub struct Behaviour {
    /// What `--kind` calls it.
    pub name: &'static str,
    /// Which fronts do it.
    pub fronts: &'static [Kind],
    /// What it does, for the log.
    pub what: &'static str,
    /// Where that is known from.
    pub source: &'static str,
    /// How sure it is.
    pub confidence: Confidence,
    /// The point of `tests/deployed` that settles it in an account.
    pub point: &'static str,
    /// The front that does not do it, for whoever needs that.
    pub instead: &'static str,
}

/// Every front of AWS ends at the Function URL.
const FUNCTION_URL: &[Kind] = &[Kind::None, Kind::CloudFront, Kind::HttpApi];
/// An HTTP API gives the name back (resources/fronts/httpapi.yml).
const WITHOUT_MAPPING: &[Kind] = &[Kind::None, Kind::CloudFront];
const CLOUD_FRONT: &[Kind] = &[Kind::CloudFront];
/// What CloudFront does whatever its origin is. A relay, which CloudFront asks once and lets say nothing to a cache, does the rest itself.
const AT_THE_EDGE: &[Kind] = &[Kind::CloudFront, Kind::Relay];
const HTTP_API: &[Kind] = &[Kind::HttpApi];

macro_rules! behaviours {
    ($( $(#[$doc:meta])* $variant:ident, $name:literal, $fronts:ident, $confidence:ident, $point:literal, $instead:literal,
        $what:literal, $source:literal; )+) => {
        /// A line of the table.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Does {
            $( $(#[$doc])* $variant, )+
        }

        /// The table, in the order of [`Does`].
        pub const TABLE: &[Behaviour] = &[$( Behaviour {
            name: $name,
            fronts: $fronts,
            what: $what,
            source: $source,
            confidence: Confidence::$confidence,
            point: $point,
            instead: $instead,
        }, )+];
    };
}

behaviours! {
    /// Compressed bodies are unpacked.
    Decode, "decoded-bodies", FUNCTION_URL, Reported, "compressed_bodies", "direct",
        "a gzip or br body was unpacked and its content-encoding dropped",
        "aws-lambda-nodejs-runtime-interface-client#96; opennextjs-aws#1127";
    /// `Content-Length` is renamed.
    RenameLength, "renamed-length", FUNCTION_URL, Reported, "content_length", "httpapi (buffered) or direct",
        "content-length became x-amzn-remapped-content-length; the length is in x-tunnel-length",
        "cargo-lambda#862, #874";
    /// `WWW-Authenticate` is renamed.
    RenameChallenge, "renamed-challenge", WITHOUT_MAPPING, Reported, "challenges", "httpapi, relay, or cloudfront with wwwAuthenticateArn",
        "www-authenticate became x-amzn-remapped-www-authenticate, so that no browser asks for a password",
        "API Gateway guide, REST header table; reports say the same of Function URLs";
    /// 200 MB, and no more.
    Cap, "response-cap", FUNCTION_URL, Documented, "large_download", "direct",
        "a response was cut at 200 MB",
        "Lambda quotas: streamed response 200 MB (since July 2025)";
    /// 2 MB/s after the first 6 MB.
    Slow, "response-rate", FUNCTION_URL, Documented, "large_download", "direct",
        "a response past its first 6 MB goes on at 2 MB/s",
        "Lambda guide, response streaming: uncapped for 6 MB, then 2 MB/s";
    /// A client that leaves is not noticed.
    Deaf, "unnoticed-departure", FUNCTION_URL, Documented, "client_leaves", "direct",
        "a public client left, or closed its sending half, and its request goes on to its end",
        "Lambda guide, response streaming: not interrupted when the client's connection breaks";
    /// Nothing of ours stands in Lambda's own refusal.
    BareThrottle, "bare-throttles", FUNCTION_URL, Documented, "few_executions", "direct",
        "an account without a free execution answered 429 by itself, without x-tunnel-error",
        "Lambda guide, scaling and concurrency: TooManyRequestsException";
    /// Bodies without a byte do not end.
    EmptyHangs, "empty-answers", FUNCTION_URL, Reported, "empty_answers", "direct",
        "a function ended an answer without a body in the same write as its head, and it does not end",
        "aws-lambda-web-adapter#499; aws-lambda-nodejs-runtime-interface-client#95; nitro#4417; serverless-adapter#206";
    /// A small piece waits for the next one.
    HoldSmall, "held-pieces", FUNCTION_URL, Reported, "small_pieces", "direct",
        "a small piece of a body waited for the next one, or for 200 ms",
        "aws-lambda-nodejs-runtime-interface-client#102; serverless-adapter#166; hono#1678";
    /// A break looks like an end.
    SilentBreak, "silent-breaks", FUNCTION_URL, Assumed, "agent_killed", "direct",
        "a response broke off and ends here as if it were whole; x-tunnel-length tells, where it is there",
        "no text says what the Function URL does with the error trailers";
    /// Errors are kept and given to others.
    CacheErrors, "cached-errors", CLOUD_FRONT, Documented, "cached_errors", "none",
        "an error was answered from the cache, which knows paths and no hosts",
        "CloudFront guide, HTTP status codes cached: 10 s by default; archimedes#1610";
    /// GET and HEAD are sent again.
    Retry, "retried-requests", CLOUD_FRONT, Documented, "retried_requests", "none",
        "a GET or HEAD was sent to the origin again",
        "botocore cloudfront, Origin.ConnectionAttempts";
    /// A silent origin is given up.
    Silence, "silence", AT_THE_EDGE, Documented, "silent_stream", "none",
        "an origin that said nothing for OriginReadTimeout was given up",
        "CloudFront guide, response time-out: also between two packets";
    /// Heads and targets are bounded.
    EdgeHeads, "edge-heads", AT_THE_EDGE, Documented, "large_heads", "none",
        "a head over 20,480 bytes, or a URL over 8,192, was refused",
        "CloudFront quotas";
    /// Seven methods, and no GET with a body.
    EdgeMethods, "edge-methods", AT_THE_EDGE, Documented, "methods", "none or httpapi",
        "CloudFront takes GET (without a body), HEAD, OPTIONS, PUT, PATCH, POST and DELETE alone",
        "CloudFront guide, request behaviour for custom origins";
    /// Paths are decoded.
    DecodePath, "decoded-paths", HTTP_API, Reported, "targets", "none or cloudfront",
        "a path was decoded, and its double slashes made one",
        "middleapi/standard-server#93; hotsock/voker#8";
    /// Answers are whole or not at all.
    Buffer, "buffered-answers", HTTP_API, Documented, "buffered", "none or cloudfront",
        "a response was kept until it was whole: at most 10 MB in 30 s",
        "API Gateway guide, HTTP API quotas: payload 10 MB, integration time-out 30 s; no streaming";
    /// Heads are bounded.
    ApiHeads, "api-heads", HTTP_API, Documented, "large_heads", "none",
        "a head over 10,240 bytes, of a request or a response, was refused",
        "API Gateway guide, HTTP API quotas";
}

/// The most bytes of a streamed body (Lambda quotas: 200 MB).
pub const RESPONSE_BYTES: u64 = limits::RESPONSE_BYTES;

/// How much of it is not slowed.
pub const BURST_BYTES: u64 = 6 * 1024 * 1024;

/// How much passes in a second then.
pub const RATE_BYTES: u64 = 2 * 1024 * 1024;

/// Which piece is small: reports are of single events. AWS has no number.
pub const SMALL_BYTES: usize = 1024;

/// For how long a small piece waits for the next one. The reports know no end of it; with none, nothing interactive could
/// be tried.
pub const SMALL_WAIT: Duration = Duration::from_millis(200);

/// The most bytes of a buffered answer (HTTP API quotas).
pub const BUFFERED_BYTES: usize = 10 * 1024 * 1024;

/// How long an HTTP API waits for the whole of it.
pub const BUFFERED_TIME: Duration = Duration::from_secs(30);

/// How long CloudFront waits for an origin by default of the parameters: `replyTimeoutSecs` and five seconds more.
pub const EDGE_READ_SECS: u64 = 60;

/// CloudFront's bound of a request's head or a response's.
pub const EDGE_HEAD_BYTES: usize = 20_480;

/// CloudFront's bound of a URL.
pub const EDGE_URL_BYTES: usize = 8192;

/// An HTTP API's bound of a request's head, and of a response's: the quota does not say of which.
pub const API_HEAD_BYTES: usize = 10_240;

/// A front as it is imitated.
#[derive(Debug)]
pub struct Imitation {
    kind: Kind,
    relaxed: Vec<&'static str>,
    said: [AtomicBool; TABLE.len()],
    /// Whose seconds count.
    pub(super) clock: Clock,
    /// How long `ingress` may run.
    pub(super) function_time: Duration,
}

impl Imitation {
    /// This front, without the behaviours of these names.
    #[must_use]
    pub fn new(kind: Kind, relaxed: &[String], clock: Clock, function_time: Duration) -> Self {
        let relaxed = TABLE.iter().map(|line| line.name).filter(|name| relaxed.iter().any(|own| own == name));
        Self { kind, relaxed: relaxed.collect(), said: Default::default(), clock, function_time }
    }

    /// How long `ingress` lets a client wait for a head, where nobody says otherwise: as resources/settings.js has it.
    #[must_use]
    pub const fn reply_timeout(&self) -> Duration {
        match self.kind {
            Kind::None | Kind::Direct => limits::REPLY_TIMEOUT,
            Kind::CloudFront | Kind::Relay => Duration::from_secs(EDGE_READ_SECS - 5),
            Kind::HttpApi => Duration::from_secs(27),
        }
    }

    /// What `ingress` asks upstreams for: see `acceptEncoding` in serverless.yml.
    #[must_use]
    pub fn accept_encoding(&self) -> &'static str {
        if self.does(Does::Decode) { "identity" } else { "pass" }
    }

    /// Which front it is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether this is done here.
    #[must_use]
    pub fn does(&self, does: Does) -> bool {
        let line = &TABLE[does as usize];
        line.fronts.contains(&self.kind) && !self.relaxed.contains(&line.name)
    }

    /// Whether that was said.
    #[cfg(test)]
    pub(super) fn has_said(&self, does: Does) -> bool {
        self.said[does as usize].load(Ordering::Relaxed)
    }

    /// Says once that it was done, so that nobody takes it for a fault of theirs.
    pub(super) fn say(&self, does: Does) {
        if self.said[does as usize].swap(true, Ordering::Relaxed) {
            return;
        }
        let line = &TABLE[does as usize];
        tracing::warn!(
            "as behind the front {}: {}. The front {} does not; --kind {} leaves it out",
            self.kind.name(),
            line.what,
            line.instead,
            line.name
        );
    }
}

/// A name for `--kind`.
///
/// # Errors
///
/// A sentence with all names.
pub fn behaviour(text: &str) -> Result<String, String> {
    if TABLE.iter().any(|line| line.name == text) {
        return Ok(text.to_owned());
    }
    let names: Vec<_> = TABLE.iter().map(|line| line.name).collect();
    Err(format!("use one of {}", names.join(", ")))
}

/// A path as an HTTP API hands it on: decoded, double slashes made one, cut at a question mark that was encoded.
pub(super) fn decoded_target(target: &[u8]) -> Vec<u8> {
    let at = target.iter().position(|&byte| byte == b'?').unwrap_or(target.len());
    let (path, query) = target.split_at(at);
    let mut decoded = Vec::with_capacity(target.len());
    let mut rest = path;
    while let Some((&first, more)) = rest.split_first() {
        let hex = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let (byte, more) = match (first, more) {
            (b'%', [high, low, more @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => (high * 16 + low, more),
                _ => (first, &rest[1..]),
            },
            _ => (first, more),
        };
        rest = more;
        if byte == b'?' {
            break;
        }
        if byte == b'/' && decoded.last() == Some(&b'/') {
            continue;
        }
        // What no request line can hold is encoded again on the way to the Function URL. `#`, `<`, `>` and a backtick stay,
        // and are refused there: nothing says that they are encoded again, and that is the worse reading.
        if byte.is_ascii_graphic() {
            decoded.push(byte);
        } else {
            decoded.extend_from_slice(format!("%{byte:02X}").as_bytes());
        }
    }
    decoded.extend_from_slice(query);
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn imitation(kind: Kind, relaxed: &[&str]) -> Imitation {
        let relaxed: Vec<_> = relaxed.iter().map(|&name| name.to_owned()).collect();
        Imitation::new(kind, &relaxed, Clock::default(), Duration::from_secs(300))
    }

    #[test]
    fn the_worse_is_the_default_and_direct_does_nothing() {
        for (index, line) in TABLE.iter().enumerate() {
            assert!(!line.fronts.contains(&Kind::Direct), "{}", line.name);
            assert!(!line.source.is_empty() && !line.point.is_empty());
            assert_eq!(TABLE.iter().filter(|other| other.name == line.name).count(), 1, "{index}");
        }
        assert!(imitation(Kind::None, &[]).does(Does::SilentBreak));
        assert!(!imitation(Kind::None, &["silent-breaks"]).does(Does::SilentBreak));
        assert!(!imitation(Kind::None, &[]).does(Does::CacheErrors));
        assert!(imitation(Kind::CloudFront, &[]).does(Does::CacheErrors));
        assert!(!imitation(Kind::Direct, &[]).does(Does::Decode));
        assert_eq!(TABLE[Does::ApiHeads as usize].name, "api-heads");
        assert_eq!(Kind::default(), Kind::None);
        assert!(behaviour("nothing").unwrap_err().contains("silent-breaks"));
    }

    #[test]
    fn the_page_for_people_has_every_line_and_no_other() {
        let page = include_str!("../../../docs/aws-fronts.md");
        let (_, table) = page.split_once("## What `local` imitates").unwrap();
        let (table, _) = table.split_once("\n## ").unwrap();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .filter(|line| line.starts_with("| `") && !line.contains("--kind"))
            .map(|line| line.split('|').map(|cell| cell.trim().trim_matches('`')).collect())
            .collect();
        assert_eq!(rows.len(), TABLE.len());
        for (row, line) in rows.iter().zip(TABLE) {
            let confidence = format!("{:?}", line.confidence).to_lowercase();
            assert_eq!(row[1..4], [line.name, &confidence, line.point]);
        }
        // Each finding has its state.
        for finding in 1..=27 {
            assert!(page.contains(&format!("| F{finding} |")), "F{finding}");
        }
    }

    #[test]
    fn an_http_api_decodes_paths_and_leaves_queries() {
        for (sent, handed_on) in [
            ("/a/b?x=%2F", "/a/b?x=%2F"),
            ("//a%2Fb%3Fc", "/a/b"),
            ("/a;b=c/d%2Fe?x", "/a;b=c/d/e?x"),
            ("/%FF%20%zz%", "/%FF%20%zz%"),
            ("/%2e%2e//x", "/../x"),
            ("/%23%3C%3E%60%22%5C", "/#<>`\"\\"),
        ] {
            assert_eq!(String::from_utf8(decoded_target(sent.as_bytes())).unwrap(), handed_on, "{sent}");
        }
    }
}
