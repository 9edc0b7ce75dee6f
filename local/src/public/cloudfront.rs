//! What the distribution of this version says, and the errors that CloudFront keeps. Enters the file that deploys
//! it; leaves numbers, and answers kept by path.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::Instant;

/// The codes that CloudFront keeps for a while (CloudFront Developer Guide, "HTTP 4xx and 5xx status codes that
/// CloudFront caches").
pub const CACHED: [u16; 12] = [400, 403, 404, 405, 410, 414, 416, 500, 501, 502, 503, 504];

/// For how long, where the distribution does not say (CloudFront Developer Guide, "Controlling how long CloudFront
/// caches errors").
const CACHED_FOR: Duration = Duration::from_secs(10);

/// How many times an origin is asked, where the distribution does not say.
const ATTEMPTS: u64 = 3;

/// How long an origin may be silent, where the distribution does not say.
const READ_TIMEOUT_SECS: u64 = 30;

/// How many errors are kept, at most.
const KEPT: usize = 1024;

/// The distribution, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub struct Distribution {
    /// How many times an origin is asked.
    pub attempts: u32,
    /// How long it may be silent.
    pub read_timeout: Duration,
    /// For how long errors are kept that are not kept for the usual time.
    pub kept: BTreeMap<u16, Duration>,
}

static DISTRIBUTION: LazyLock<Distribution> = LazyLock::new(|| {
    let text = include_str!("../../../resources/fronts/cloudfront.yml");
    Distribution::parse(text).unwrap_or_else(|problem| panic!("cloudfront.yml: {problem}"))
});

/// The distribution of this version.
#[must_use]
pub fn distribution() -> &'static Distribution {
    &DISTRIBUTION
}

impl Distribution {
    fn parse(text: &str) -> Result<Self, String> {
        let file = crate::stack::read(text).map_err(|error| error.to_string())?;
        let resources = file["stack"]["Resources"].as_object().ok_or("no resources")?;
        let config = resources
            .values()
            .find(|resource| resource["Type"] == "AWS::CloudFront::Distribution")
            .map(|resource| &resource["Properties"]["DistributionConfig"])
            .ok_or("no distribution")?;
        let origin = &config["Origins"][0];
        let attempts = origin["ConnectionAttempts"].as_u64().unwrap_or(ATTEMPTS);
        let read = &origin["CustomOriginConfig"]["OriginReadTimeout"];
        // A number, or a setting whose default stands in settings.js and is what `local` goes by.
        let read = match read.as_u64() {
            Some(read) => read,
            None if read.is_string() => super::fronts::EDGE_READ_SECS,
            None => READ_TIMEOUT_SECS,
        };
        let mut kept = BTreeMap::new();
        for response in config["CustomErrorResponses"].as_array().into_iter().flatten() {
            let code = response["ErrorCode"].as_u64().and_then(|code| u16::try_from(code).ok());
            let time = response["ErrorCachingMinTTL"].as_u64();
            let (Some(code), Some(time)) = (code, time) else { return Err("an error without a time".into()) };
            kept.insert(code, Duration::from_secs(time));
        }
        let attempts = u32::try_from(attempts).map_err(|error| error.to_string())?;
        Ok(Self { attempts, read_timeout: Duration::from_secs(read), kept })
    }

    /// For how long an answer with this status is kept.
    #[must_use]
    pub fn keeps(&self, status: u16) -> Duration {
        if CACHED.contains(&status) {
            self.kept.get(&status).copied().unwrap_or(CACHED_FOR)
        } else {
            Duration::ZERO
        }
    }

    /// The codes that are kept at all.
    #[must_use]
    pub fn leaks(&self) -> BTreeSet<u16> {
        CACHED.into_iter().filter(|&status| !self.keeps(status).is_zero()).collect()
    }
}

/// An error that was kept.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// Errors by path. The host is no part of it: that is how one tunnel's error can answer another's request.
#[derive(Debug, Default)]
pub(super) struct Errors(Mutex<HashMap<Vec<u8>, (Instant, Kept)>>);

impl Errors {
    pub(super) fn find(&self, path: &[u8]) -> Option<Kept> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, error) = kept.get(path)?;
        if *until > Instant::now() {
            return Some(error.clone());
        }
        kept.remove(path);
        None
    }

    pub(super) fn keep(&self, path: &[u8], time: Duration, error: Kept) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(path.to_vec(), (Instant::now() + time, error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: &str = "stack: {Resources: {One: {Type: 'AWS::CloudFront::Distribution', Properties: \
        {DistributionConfig: {Origins: [{Id: a}]}}}}}";

    #[test]
    fn a_distribution_that_says_nothing_keeps_errors_and_asks_again() {
        let plain = Distribution::parse(DEFAULTS).unwrap();
        assert_eq!((plain.attempts, plain.read_timeout), (3, Duration::from_secs(30)));
        assert_eq!(plain.keeps(503), Duration::from_secs(10));
        assert_eq!(plain.keeps(200), Duration::ZERO);
        assert_eq!(plain.leaks().len(), CACHED.len());
    }

    #[test]
    fn the_distribution_of_this_version_keeps_no_error_and_asks_once() {
        // CloudFront takes no time for 410; it honours `no-store` there.
        assert_eq!(distribution().leaks(), BTreeSet::from([410]));
        assert_eq!(distribution().attempts, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_answers_for_its_path_until_its_time_is_over() {
        let errors = Errors::default();
        let error = Kept {
            status: StatusCode::SERVICE_UNAVAILABLE,
            headers: HeaderMap::new(),
            body: Bytes::from_static(b"of one tunnel"),
        };
        errors.keep(b"/", Duration::from_secs(10), error);
        assert!(errors.find(b"/other").is_none());
        tokio::time::advance(Duration::from_millis(9_999)).await;
        assert_eq!(errors.find(b"/").unwrap().body, "of one tunnel");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(errors.find(b"/").is_none());
    }
}
