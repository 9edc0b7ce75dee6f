//! What was asked, what may come of it, and what came. Pure.

use std::{collections::BTreeMap, ops::AddAssign};

use ::tests::noise;
use fastrand::Rng;

use crate::scenario::{Shape, Strictness};

/// What the upstream does with one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Answers with what it was sent.
    Echo,
    /// Answers with so many bytes in pieces, with pauses.
    Stream,
    /// Answers with a status of its own.
    Status(u16),
    /// Breaks off in the middle of a body whose length it has announced.
    Short,
    /// Closes the connection instead of answering.
    Reset,
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Its number, unlike every other's of the run.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    /// How many bytes are sent; `None` for a `GET`.
    pub(crate) sent: Option<usize>,
    /// How many bytes are to come back.
    pub(crate) back: usize,
}

impl Ask {
    /// Request number `index` of a run.
    pub(crate) fn new(seed: u64, index: usize, shape: Shape) -> Self {
        let mut random = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64));
        let size = |random: &mut Rng, most: usize| {
            // As many small ones as large ones, and the ends of what is cut into pieces.
            let bits = random.u32(0..=most.ilog2());
            let around = 1_usize << bits;
            (around + random.usize(..around)).min(most)
        };
        let mut ask = Self { id: index as u64, kind: Kind::Echo, sent: None, back: 0 };
        let echo = |ask: &mut Self, bytes: usize| {
            ask.sent = Some(bytes);
            ask.back = bytes;
        };
        match shape {
            Shape::Small if random.bool() => echo(&mut ask, random.usize(1..200)),
            Shape::Small => ask.back = random.usize(..200),
            Shape::Bodies if random.bool() => echo(&mut ask, size(&mut random, 600_000)),
            Shape::Bodies => ask.back = size(&mut random, 1_000_000),
            Shape::Streams => (ask.kind, ask.back) = (Kind::Stream, size(&mut random, 200_000)),
            Shape::Mixed => match random.u8(..12) {
                0 => (ask.kind, ask.back) = (Kind::Stream, size(&mut random, 100_000)),
                1 => echo(&mut ask, size(&mut random, 300_000)),
                2 => ask.kind = Kind::Status([404, 418, 500, 502, 503, 301, 204][random.usize(..7)]),
                3 => (ask.kind, ask.back) = (Kind::Short, 1000 + size(&mut random, 100_000)),
                4 => ask.kind = Kind::Reset,
                5..=8 => echo(&mut ask, random.usize(1..3000)),
                _ => ask.back = random.usize(..3000),
            },
        }
        ask
    }

    /// The request-target: all that the upstream has to know.
    pub(crate) fn target(&self) -> String {
        match self.kind {
            Kind::Echo => format!("/echo/{}/{}", self.id, self.back),
            Kind::Stream => format!("/stream/{}/{}", self.id, self.back),
            Kind::Status(status) => format!("/status/{}/{status}", self.id),
            Kind::Short => format!("/short/{}/{}", self.id, self.back),
            Kind::Reset => format!("/reset/{}/0", self.id),
        }
    }

    /// The body that is sent, and of an echo the one that comes back.
    pub(crate) fn body(&self) -> Vec<u8> {
        noise(self.id + 1, self.back)
    }

    /// The status of an answer that is right.
    const fn status(&self) -> u16 {
        match self.kind {
            Kind::Status(status) => status,
            _ => 200,
        }
    }
}

/// What a client saw.
#[derive(Debug)]
pub(crate) enum Seen {
    /// The connection ended before a head, or there was none.
    Nothing,
    /// Nothing came in time.
    Late,
    /// A head and what came behind it.
    Answer {
        status: u16,
        /// What `x-tunnel-error` says.
        code: Option<String>,
        /// Which request the upstream meant, as it says itself.
        id: Option<u64>,
        body: Vec<u8>,
        /// Whether the framing says that this was all.
        complete: bool,
    },
}

/// What it comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As without a tunnel.
    Right,
    /// A status that says whose fault it is.
    Honest(String),
    /// The client can see that something is missing.
    Broken,
    /// A promise is broken.
    Wrong(String),
}

/// Judges one request.
pub(crate) fn judge(ask: &Ask, seen: &Seen, strictness: Strictness) -> Verdict {
    let wrong = |what: &str| Verdict::Wrong(format!("request {} ({}): {what}", ask.id, ask.target()));
    let verdict = match seen {
        Seen::Late => return wrong("no end within the time"),
        Seen::Nothing => Verdict::Broken,
        Seen::Answer { status, code: Some(code), complete, .. } => match status {
            429 | 500 | 502 | 503 | 504 if *complete => Verdict::Honest(format!("{status} {code}")),
            404 if strictness == Strictness::Forgetful && code == "no_such_tunnel" => {
                Verdict::Honest(format!("{status} {code}"))
            }
            // The end of one of our own pages may be lost like any other.
            429 | 500 | 502 | 503 | 504 => Verdict::Broken,
            _ => return wrong(&format!("{status} with the error {code}")),
        },
        Seen::Answer { status, id, body, complete, code: None } => {
            if *id != Some(ask.id) {
                return wrong(&format!("the answer of request {id:?} with status {status}"));
            }
            if *status != ask.status() {
                return wrong(&format!("status {status}"));
            }
            let expected = ask.body();
            if !expected.starts_with(body) {
                return wrong(&format!("{} bytes that are not its own", body.len()));
            }
            match (complete, body.len() == expected.len()) {
                (true, true) => Verdict::Right,
                (false, _) => Verdict::Broken,
                (true, false) => {
                    return wrong(&format!("silently short: {} of {}", body.len(), expected.len()));
                }
            }
        }
    };
    match (ask.kind, &verdict) {
        // It cannot be answered: an error that looks like an answer would be the fault.
        (Kind::Short | Kind::Reset, Verdict::Right) => wrong("whole, where the upstream broke off"),
        (Kind::Short | Kind::Reset, _) => verdict,
        (_, Verdict::Honest(code)) if strictness == Strictness::Quiet => {
            wrong(&format!("{code}, and nothing was wrong"))
        }
        (_, Verdict::Broken) if strictness == Strictness::Quiet => wrong("broken off, and nothing was wrong"),
        _ => verdict,
    }
}

/// Judges what the upstream saw of it.
pub(crate) fn judge_calls(ask: &Ask, verdict: &Verdict, calls: u32) -> Option<String> {
    let what = match (calls, verdict) {
        (0, Verdict::Right) => "answered, and the upstream never saw it".to_owned(),
        (2.., _) if ask.sent.is_some() => format!("the upstream saw it {calls} times"),
        (4.., _) => format!("the upstream saw it {calls} times"),
        _ => return None,
    };
    Some(format!("request {} ({}): {what}", ask.id, ask.target()))
}

/// What many requests came to.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tally {
    pub(crate) requests: u64,
    pub(crate) right: u64,
    pub(crate) honest: BTreeMap<String, u64>,
    pub(crate) broken: u64,
    /// Requests without a body that the upstream saw more than once.
    pub(crate) repeated: u64,
    pub(crate) wrong: Vec<String>,
}

impl Tally {
    pub(crate) fn count(&mut self, verdict: Verdict) {
        self.requests += 1;
        match verdict {
            Verdict::Right => self.right += 1,
            Verdict::Honest(code) => *self.honest.entry(code).or_default() += 1,
            Verdict::Broken => self.broken += 1,
            Verdict::Wrong(what) => self.wrong.push(what),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.right += other.right;
        self.broken += other.broken;
        self.repeated += other.repeated;
        for (code, count) in other.honest {
            *self.honest.entry(code).or_default() += count;
        }
        self.wrong.extend(other.wrong);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(kind: Kind, back: usize) -> Ask {
        Ask { id: 7, kind, sent: None, back }
    }

    fn answer(status: u16, id: u64, body: Vec<u8>, complete: bool) -> Seen {
        Seen::Answer { status, code: None, id: Some(id), body, complete }
    }

    fn own(status: u16, code: &str) -> Seen {
        Seen::Answer { status, code: Some(code.to_owned()), id: None, body: Vec::new(), complete: true }
    }

    #[test]
    fn only_what_is_whole_and_its_own_is_right() {
        let echo = ask(Kind::Echo, 100);
        let whole = echo.body();
        assert_eq!(judge(&echo, &answer(200, 7, whole.clone(), true), Strictness::Quiet), Verdict::Right);
        let wrong = |seen: Seen| matches!(judge(&echo, &seen, Strictness::Honest), Verdict::Wrong(_));
        assert!(wrong(answer(200, 7, whole[..99].to_vec(), true)), "silently short");
        assert!(wrong(answer(200, 8, whole.clone(), true)), "another's");
        assert!(wrong(answer(200, 7, noise(9, 50), false)), "another's body");
        assert!(wrong(answer(201, 7, whole.clone(), true)), "another status");
        assert!(wrong(Seen::Late));
        let unknown = own(404, "no_such_tunnel");
        assert!(wrong(own(404, "no_such_tunnel")), "an error that is not true");
        assert!(matches!(judge(&echo, &unknown, Strictness::Forgetful), Verdict::Honest(_)));
        assert_eq!(
            judge(&echo, &answer(200, 7, whole[..50].to_vec(), false), Strictness::Honest),
            Verdict::Broken
        );
        assert_eq!(
            judge(&echo, &own(503, "tunnel_offline"), Strictness::Honest),
            Verdict::Honest("503 tunnel_offline".into())
        );
    }

    #[test]
    fn where_nothing_goes_wrong_nothing_but_right_will_do() {
        let echo = ask(Kind::Echo, 10);
        for seen in [own(503, "tunnel_offline"), Seen::Nothing] {
            assert!(matches!(judge(&echo, &seen, Strictness::Quiet), Verdict::Wrong(_)));
        }
        let short = ask(Kind::Short, 10);
        assert_eq!(
            judge(&short, &own(502, "upstream_broken"), Strictness::Quiet),
            Verdict::Honest("502 upstream_broken".into())
        );
        assert!(matches!(
            judge(&short, &answer(200, 7, short.body(), true), Strictness::Quiet),
            Verdict::Wrong(_)
        ));
    }

    #[test]
    fn an_upstream_sees_what_changes_something_at_most_once() {
        let get = ask(Kind::Echo, 1);
        let post = Ask { sent: Some(1), ..get.clone() };
        assert_eq!(judge_calls(&post, &Verdict::Right, 1), None);
        assert_eq!(judge_calls(&post, &Verdict::Broken, 0), None);
        assert!(judge_calls(&post, &Verdict::Broken, 2).is_some());
        assert!(judge_calls(&get, &Verdict::Right, 0).is_some());
        assert_eq!(judge_calls(&get, &Verdict::Right, 2), None);
        assert!(judge_calls(&get, &Verdict::Right, 4).is_some());
    }
}
