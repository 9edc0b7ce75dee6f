//! The body of an answer as a front lets it through: enters what the function streams, leaves what the front sends
//! on. What it does to it is in [`super::fronts`].

use std::{
    io::{self, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep, sleep_until};

use super::fronts::{BURST_BYTES, Does, Imitation, RATE_BYTES, RESPONSE_BYTES, SMALL_BYTES, SMALL_WAIT};
use crate::lambda::{Broken, StreamBody};

/// What a function streams, on its way through a front.
pub(super) struct Origin {
    /// Taken when it is to be heard to its end without anybody.
    stream: Option<StreamBody>,
    imitation: Arc<Imitation>,
    decoder: Option<Decoder>,
    /// What came of the function.
    came: u64,
    /// What waits until its time has come.
    held: Option<(Bytes, Pin<Box<Sleep>>)>,
    /// From when on what comes after the burst may pass.
    free_at: Option<Instant>,
    /// How long the function may be silent.
    silence: Option<Silence>,
    /// A small piece that waits for the next one, until its time is over.
    small: Option<(Bytes, Pin<Box<Sleep>>)>,
    has_ended: bool,
}

impl Origin {
    pub(super) fn new(
        stream: StreamBody,
        imitation: Arc<Imitation>,
        decoder: Option<Decoder>,
        silence: Option<Duration>,
    ) -> Self {
        let silence = silence.map(Silence::new);
        Self {
            stream: Some(stream),
            imitation,
            decoder,
            came: 0,
            held: None,
            free_at: None,
            silence,
            small: None,
            has_ended: false,
        }
    }

    /// Gives a piece back that was taken before: it comes first.
    pub(super) fn put_back(&mut self, piece: Bytes) {
        self.came += piece.len() as u64;
        self.held = Some((piece, Box::pin(sleep(Duration::ZERO))));
    }

    /// Everything that is sent on has come: the function may end by itself.
    pub(super) fn let_end(mut self) {
        if let Some(stream) = self.stream.take() {
            tokio::spawn(super::finish(stream));
        }
    }

    /// The next piece; none at the end.
    pub(super) fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        if !self.imitation.does(Does::HoldSmall) {
            return self.poll_piece(context);
        }
        loop {
            let next = self.poll_piece(context)?;
            let before = self.small.take();
            match (next, before) {
                (Poll::Ready(Some(piece)), before) if piece.len() < SMALL_BYTES => {
                    self.small = Some((piece, Box::pin(sleep(SMALL_WAIT))));
                    if let Some((before, _)) = before {
                        return Poll::Ready(Ok(Some(before)));
                    }
                }
                (Poll::Ready(Some(piece)), Some((before, _))) => {
                    return Poll::Ready(Ok(Some([before, piece].concat().into())));
                }
                (Poll::Ready(None), Some((before, _))) => return Poll::Ready(Ok(Some(before))),
                (Poll::Ready(piece), None) => return Poll::Ready(Ok(piece)),
                (Poll::Pending, Some((small, mut due))) => {
                    if due.as_mut().poll(context).is_ready() {
                        self.imitation.say(Does::HoldSmall);
                        return Poll::Ready(Ok(Some(small)));
                    }
                    self.small = Some((small, due));
                    return Poll::Pending;
                }
                (Poll::Pending, None) => return Poll::Pending,
            }
        }
    }

    /// The next piece as the function sent it, when its time has come.
    fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            if let Some((_, due)) = &mut self.held {
                ready!(due.as_mut().poll(context));
                return Poll::Ready(Ok(self.held.take().map(|(piece, _)| piece)));
            }
            let Some(stream) = &mut self.stream else { return Poll::Ready(Ok(None)) };
            if self.has_ended {
                return Poll::Ready(Ok(None));
            }
            let Poll::Ready(next) = stream.poll_next(context) else {
                if self.silence.as_mut().is_some_and(|silence| silence.is_over(context)) {
                    self.imitation.say(Does::Silence);
                    return Poll::Ready(Err(Broken));
                }
                return Poll::Pending;
            };
            if let Some(silence) = &mut self.silence {
                silence.end();
            }
            let piece = match next {
                Ok(Some(piece)) => piece,
                Ok(None) => {
                    self.has_ended = true;
                    match self.decoder.take().map(Decoder::finish) {
                        Some(Ok(rest)) if !rest.is_empty() => return Poll::Ready(Ok(Some(rest))),
                        Some(Err(_)) => return Poll::Ready(Err(Broken)),
                        _ => return Poll::Ready(Ok(None)),
                    }
                }
                Err(Broken) if self.imitation.does(Does::SilentBreak) => {
                    if self.came >= RESPONSE_BYTES {
                        self.imitation.say(Does::Cap);
                    } else {
                        self.imitation.say(Does::SilentBreak);
                    }
                    self.has_ended = true;
                    return Poll::Ready(Ok(None));
                }
                Err(broken) => {
                    self.has_ended = true;
                    return Poll::Ready(Err(broken));
                }
            };
            let due = self.due(piece.len() as u64);
            let piece = match &mut self.decoder {
                None => piece,
                Some(decoder) => match decoder.write(&piece) {
                    Ok(piece) => piece,
                    Err(_) => return Poll::Ready(Err(Broken)),
                },
            };
            match due {
                Some(due) => self.held = Some((piece, Box::pin(sleep_until(due)))),
                None if piece.is_empty() => {}
                None => return Poll::Ready(Ok(Some(piece))),
            }
        }
    }

    /// Counts so many more bytes: when they may pass, if not now.
    fn due(&mut self, bytes: u64) -> Option<Instant> {
        let before = self.came;
        self.came += bytes;
        if self.came <= BURST_BYTES || !self.imitation.does(Does::Slow) {
            return None;
        }
        self.imitation.say(Does::Slow);
        let slowed = self.came - before.max(BURST_BYTES);
        #[expect(clippy::cast_precision_loss, reason = "at most 200 MB")]
        let takes = Duration::from_secs_f64(slowed as f64 / RATE_BYTES as f64);
        let from = self.free_at.unwrap_or_else(Instant::now).max(Instant::now());
        self.free_at = Some(from + self.imitation.clock.scale(takes));
        self.free_at
    }
}

impl Drop for Origin {
    /// The client left: a function that does not hear of it goes on.
    fn drop(&mut self) {
        if let Some(stream) = self.stream.take()
            && !self.has_ended
            && self.imitation.does(Does::Deaf)
        {
            self.imitation.say(Does::Deaf);
            tokio::spawn(super::hear_out(stream));
        }
    }
}

/// How long an origin may be silent, and until when.
pub(super) struct Silence {
    most: Duration,
    due: Pin<Box<Sleep>>,
}

impl Silence {
    /// Begins now.
    pub(super) fn new(most: Duration) -> Self {
        Self { most, due: Box::pin(sleep(most)) }
    }

    /// Something was said: the next silence begins.
    pub(super) fn end(&mut self) {
        self.due.as_mut().reset(Instant::now() + self.most);
    }

    /// Whether it has been too long.
    pub(super) fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        self.due.as_mut().poll(context).is_ready()
    }
}

/// Unpacks what comes, as it comes.
pub(super) struct Decoder {
    format: Format,
    /// Whether anything came: of nothing, nothing is unpacked, and it is whole.
    has_begun: bool,
}

enum Format {
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    Brotli(Box<brotli_decompressor::DecompressorWriter<Vec<u8>>>),
}

impl Decoder {
    /// For this `Content-Encoding`, if Lambda's front unpacks it.
    pub(super) fn of(encoding: &[u8]) -> Option<Self> {
        let encoding = encoding.trim_ascii();
        let format = if encoding.eq_ignore_ascii_case(b"gzip") || encoding.eq_ignore_ascii_case(b"x-gzip") {
            Format::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new())))
        } else if encoding.eq_ignore_ascii_case(b"br") {
            Format::Brotli(Box::new(brotli_decompressor::DecompressorWriter::new(Vec::new(), 4096)))
        } else {
            return None;
        };
        Some(Self { format, has_begun: false })
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<Bytes> {
        self.has_begun |= !piece.is_empty();
        match &mut self.format {
            Format::Gzip(decoder) => {
                decoder.write_all(piece)?;
                decoder.flush()?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
            Format::Brotli(decoder) => {
                decoder.write_all(piece)?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
        }
    }

    fn finish(self) -> io::Result<Bytes> {
        if !self.has_begun {
            return Ok(Bytes::new());
        }
        match self.format {
            Format::Gzip(decoder) => decoder.finish().map(Bytes::from),
            Format::Brotli(mut decoder) => {
                decoder.close()?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;
    use crate::{clock::Clock, public::fronts::Kind};

    const MIB: usize = 1024 * 1024;

    fn origin(
        pieces: &[&'static str],
        relaxed: &[&str],
        clock: u32,
        silence: Option<Duration>,
    ) -> (Origin, impl Fn() -> bool + use<>) {
        let relaxed: Vec<_> = relaxed.iter().map(|&name| name.to_owned()).collect();
        let imitation =
            Imitation::new(Kind::CloudFront, &relaxed, Clock::new(clock), Duration::from_secs(300));
        let (stream, listens) = StreamBody::unended(pieces);
        (Origin::new(stream, imitation.into(), None, silence), listens)
    }

    async fn next(origin: &mut Origin) -> Result<Option<Bytes>, Broken> {
        poll_fn(|context| origin.poll_next(context)).await
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_after_the_burst_takes_its_time_on_a_fast_clock_too() {
        let piece: &'static str = Box::leak("x".repeat(MIB).into_boxed_str());
        for (clock, ms) in [(1, 1000), (10, 100)] {
            let (mut origin, _listens) = origin(&[piece; 8], &[], clock, None);
            let begun = Instant::now();
            for number in 0..8 {
                if number == 6 {
                    assert_eq!(begun.elapsed(), Duration::ZERO, "6 MB are not slowed");
                }
                assert_eq!(next(&mut origin).await.unwrap().unwrap().len(), MIB);
            }
            assert_eq!(begun.elapsed().as_millis(), ms);
        }
        // What is at the bound is not slowed, and one byte more is, by what it takes itself.
        let (mut one_more, _listens) =
            origin(&[piece, piece, piece, piece, piece, piece, "x"], &["held-pieces"], 1, None);
        let begun = Instant::now();
        for _ in 0..6 {
            next(&mut one_more).await.unwrap().unwrap();
        }
        assert!(begun.elapsed().is_zero() && !one_more.imitation.has_said(Does::Slow));
        assert_eq!(next(&mut one_more).await.unwrap().unwrap(), "x");
        assert!(!begun.elapsed().is_zero() && one_more.imitation.has_said(Does::Slow));
        let (mut origin, _listens) = origin(&[piece; 8], &["response-rate"], 1, None);
        let begun = Instant::now();
        for _ in 0..8 {
            next(&mut origin).await.unwrap().unwrap();
        }
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_break_and_the_cap_look_like_an_end_unless_that_is_left_out() {
        for (relaxed, came, looks_whole) in
            [(&[][..], 4, true), (&["silent-breaks"], 4, false), (&[], RESPONSE_BYTES, true)]
        {
            let (mut origin, listens) = origin(&["half"], relaxed, 1, None);
            assert_eq!(next(&mut origin).await.unwrap().unwrap(), "half");
            origin.came = came;
            // The function ends without a word.
            drop(listens);
            assert_eq!(next(&mut origin).await.is_ok_and(|end| end.is_none()), looks_whole, "{relaxed:?}");
            let said = |does| origin.imitation.has_said(does);
            assert_eq!(said(Does::SilentBreak), looks_whole && came < RESPONSE_BYTES);
            assert_eq!(said(Does::Cap), came == RESPONSE_BYTES);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_function_is_given_up_and_one_that_speaks_in_time_is_not() {
        let (mut origin, _listens) = origin(&[".", "."], &["held-pieces"], 1, Some(Duration::from_secs(60)));
        for _ in 0..2 {
            sleep(Duration::from_secs(59)).await;
            assert!(next(&mut origin).await.unwrap().is_some());
        }
        let begun = Instant::now();
        assert_eq!(next(&mut origin).await, Err(Broken));
        assert_eq!(begun.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_piece_waits_for_the_next_one_or_its_time() {
        let (mut origin, _listens) = origin(&["a", "b"], &[], 1, None);
        let begun = Instant::now();
        assert_eq!(next(&mut origin).await.unwrap().unwrap(), "a");
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(next(&mut origin).await.unwrap().unwrap(), "b");
        assert_eq!(begun.elapsed(), SMALL_WAIT);
        let long: &'static str = Box::leak("x".repeat(SMALL_BYTES).into_boxed_str());
        let (mut origin, _listens) = self::origin(&["a", long], &[], 1, None);
        assert_eq!(next(&mut origin).await.unwrap().unwrap().len(), SMALL_BYTES + 1);
    }

    #[test]
    fn what_is_packed_comes_out_whole_however_it_is_cut() {
        let text: Vec<u8> = (0..20_000_u32).flat_map(|number| (number % 251).to_le_bytes()).collect();
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(&text).unwrap();
        let packed = packer.finish().unwrap();
        for cut in [1, 7, 4096] {
            let mut decoder = Decoder::of(b" GZIP").unwrap();
            let mut out = Vec::new();
            for piece in packed.chunks(cut) {
                out.extend_from_slice(&decoder.write(piece).unwrap());
            }
            out.extend_from_slice(&decoder.finish().unwrap());
            assert!(out == text, "{cut}");
        }
        // "hello" in a stream that is stored and not packed.
        let mut decoder = Decoder::of(b"br").unwrap();
        let mut out = decoder.write(&[0x0b, 0x02, 0x80]).unwrap().to_vec();
        out.extend_from_slice(&decoder.write(b"hello\x03").unwrap());
        out.extend_from_slice(&decoder.finish().unwrap());
        assert_eq!(out, b"hello");
        // Nothing is whole, and a part of something is not.
        for encoding in [&b"gzip"[..], b"br"] {
            let mut nothing = Decoder::of(encoding).unwrap();
            assert!(nothing.write(b"").unwrap().is_empty());
            assert!(nothing.finish().unwrap().is_empty());
        }
        for part in [1, 5, packed.len() - 1] {
            let mut decoder = Decoder::of(b"gzip").unwrap();
            assert!(decoder.write(&packed[..part]).is_err() || decoder.finish().is_err(), "{part}");
        }
        assert!(Decoder::of(b"zstd").is_none() && Decoder::of(b"identity").is_none());
    }
}
