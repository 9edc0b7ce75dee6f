//! A piece of body inside a JSON message, and how it is encoded.
//!
//! Three forms travel: `{"text": "…"}` for what is valid UTF-8 and cheaper that way,
//! `{"base64": "…"}` for everything else, and `{"zstd": "…"}` (base64 of a zstd frame) where the
//! receiver said in `hello`, `welcome` or `continue` that it can decode it.

use std::borrow::Cow;

use base64_simd::STANDARD;
use serde::{Deserialize, Serialize};

use crate::{json::push_string, limits::CHUNK_BYTES};

/// A compression that both ends of the link know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// Zstandard (RFC 8878).
    Zstd,
}

/// The codecs a peer announced. Names this version does not know are skipped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Codecs(pub Vec<Codec>);

impl Codecs {
    /// Everything this version can decode.
    #[must_use]
    pub fn all() -> Self {
        Self(vec![Codec::Zstd])
    }

    /// Whether `codec` was announced.
    #[must_use]
    pub fn has(&self, codec: Codec) -> bool {
        self.0.contains(&codec)
    }
}

impl<'de> Deserialize<'de> for Codecs {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<Cow<'de, str>>::deserialize(deserializer)?;
        Ok(Self(names.iter().filter(|name| **name == "zstd").map(|_| Codec::Zstd).take(1).collect()))
    }
}

/// The most raw bytes that one compressed chunk may unfold to. It bounds what a receiver holds
/// for one message, whatever the compressed bytes claim.
pub const COMPRESSED_CHUNK_BYTES: usize = 256 * 1024;

/// Below this many bytes compression is not tried: a message of up to 32 KB costs the same
/// whatever it holds, and a frame header would eat the gain.
///
/// Measured with text at level 1: from about 1 KiB on the base64 of the frame is shorter than
/// the text itself; below, it is not.
pub const COMPRESS_FROM_BYTES: usize = 1024;

const ZSTD_LEVEL: i32 = 1;

/// Why a body could not be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// Not base64 with padding.
    #[error("body is not valid base64")]
    Base64,
    /// Not a whole zstd frame.
    #[error("body is not a valid zstd frame")]
    Zstd,
    /// More bytes than one message may carry.
    #[error("body is longer than one message may carry")]
    TooLong,
}

/// A piece of body as it stands in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body<'a> {
    /// The bytes are this text in UTF-8.
    #[serde(borrow)]
    Text(Cow<'a, str>),
    /// The bytes in base64 (RFC 4648 §4, padded).
    #[serde(borrow)]
    Base64(Cow<'a, str>),
    /// The bytes as one zstd frame, in base64.
    #[serde(borrow)]
    Zstd(Cow<'a, str>),
}

impl<'a> Body<'a> {
    /// Encodes `bytes` in the shorter of the two forms that everybody knows.
    #[must_use]
    pub fn encode(bytes: &'a [u8]) -> Self {
        let base64_len = bytes.len().div_ceil(3) * 4;
        match std::str::from_utf8(bytes) {
            Ok(text) if escaped_len(text).is_some_and(|len| len <= base64_len) => Self::Text(text.into()),
            _ => Self::Base64(STANDARD.encode_to_string(bytes).into()),
        }
    }

    /// Encodes as much of the front of `bytes` as one message takes, and says how much that was.
    ///
    /// With a codec up to [`COMPRESSED_CHUNK_BYTES`] go into one message if they become small
    /// enough; otherwise up to [`CHUNK_BYTES`].
    #[must_use]
    pub fn encode_front(bytes: &'a [u8], codec: Option<Codec>) -> (Self, usize) {
        let plain = &bytes[..bytes.len().min(CHUNK_BYTES)];
        if codec == Some(Codec::Zstd) && bytes.len() >= COMPRESS_FROM_BYTES {
            let most = &bytes[..bytes.len().min(COMPRESSED_CHUNK_BYTES)];
            for front in [most, plain] {
                if let Ok(frame) = zstd::bulk::compress(front, ZSTD_LEVEL)
                    && frame.len() <= CHUNK_BYTES
                    && frame.len() < front.len() / 10 * 7
                {
                    return (Self::Zstd(STANDARD.encode_to_string(frame).into()), front.len());
                }
                if most.len() == plain.len() {
                    break;
                }
            }
        }
        (Self::encode(plain), plain.len())
    }

    /// The bytes.
    ///
    /// # Errors
    ///
    /// [`BodyError`] when the encoding is broken or unfolds to more than one message may carry.
    pub fn decode(self) -> Result<Vec<u8>, BodyError> {
        let from_base64 = |text: &str| STANDARD.decode_to_vec(text).map_err(|_| BodyError::Base64);
        match self {
            Self::Text(text) => Ok(text.into_owned().into_bytes()),
            Self::Base64(text) => from_base64(&text),
            Self::Zstd(text) => {
                let frame = from_base64(&text)?;
                // The frame's own claim is checked first, so that a lie costs no memory.
                let claimed = zstd::zstd_safe::get_frame_content_size(&frame).map_err(|_| BodyError::Zstd)?;
                match claimed {
                    Some(len) if len <= COMPRESSED_CHUNK_BYTES as u64 => {
                        zstd::bulk::decompress(&frame, COMPRESSED_CHUNK_BYTES).map_err(|_| BodyError::Zstd)
                    }
                    Some(_) => Err(BodyError::TooLong),
                    None => Err(BodyError::Zstd),
                }
            }
        }
    }

    /// Appends the body as serde_json writes it.
    pub(crate) fn push(&self, json: &mut Vec<u8>) {
        let (form, text) = match self {
            Self::Text(text) => ("text", text),
            Self::Base64(text) => ("base64", text),
            Self::Zstd(text) => ("zstd", text),
        };
        json.push(b'{');
        push_string(json, form);
        json.push(b':');
        push_string(json, text);
        json.push(b'}');
    }

    /// The same body, independent of what it was decoded from.
    #[must_use]
    pub fn into_owned(self) -> Body<'static> {
        match self {
            Self::Text(text) => Body::Text(text.into_owned().into()),
            Self::Base64(text) => Body::Base64(text.into_owned().into()),
            Self::Zstd(text) => Body::Zstd(text.into_owned().into()),
        }
    }
}

/// How many bytes `text` takes as the inside of a JSON string, or `None` where a mailbox would
/// refuse it (SQS takes no U+FFFE and U+FFFF, API Reference "SendMessage").
fn escaped_len(text: &str) -> Option<usize> {
    // Both begin with this byte, which is rare in itself.
    if text.as_bytes().contains(&0xef) && text.contains(['\u{fffe}', '\u{ffff}']) {
        return None;
    }
    Some(text.len() + escape_bytes(text))
}

/// How many bytes longer `text` is inside a JSON string than it is itself.
#[must_use]
pub fn escape_bytes(text: &str) -> usize {
    // Pieces small enough for a byte to count each kind: the loop is one for vector instructions.
    text.as_bytes()
        .chunks(32)
        .map(|piece| {
            let short =
                piece.iter().map(|&byte| u8::from(byte == b'"') + u8::from(byte == b'\\')).sum::<u8>();
            let control = piece.iter().map(|&byte| u8::from(byte < 0x20)).sum::<u8>();
            let long = if control == 0 {
                0
            } else {
                piece
                    .iter()
                    .map(|&byte| match byte {
                        b'\n' | b'\r' | b'\t' | 8 | 12 => 1,
                        0..0x20 => 5,
                        _ => 0,
                    })
                    .sum()
            };
            usize::from(short) + long
        })
        .sum()
}

/// Whether a response with these fields is worth compressing on the link: text-like, and not
/// already encoded.
#[must_use]
pub fn is_compressible(content_type: Option<&str>, content_encoding: Option<&str>) -> bool {
    if content_encoding.is_some_and(|coding| !coding.trim().eq_ignore_ascii_case("identity")) {
        return false;
    }
    let Some(content_type) = content_type else { return false };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.starts_with("text/")
        || essence.ends_with("+json")
        || essence.ends_with("+xml")
        || matches!(
            essence.as_str(),
            "application/json"
                | "application/javascript"
                | "application/x-javascript"
                | "application/xml"
                | "application/wasm"
                | "application/x-ndjson"
                | "application/manifest+json"
        )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::MESSAGE_BYTES;

    #[test]
    fn text_travels_as_text_and_bytes_as_base64() {
        assert!(matches!(Body::encode(b"plain"), Body::Text(_)));
        assert!(matches!(Body::encode(b"\xff\x00"), Body::Base64(_)));
        assert!(matches!(Body::encode(&[b'"'; 100]), Body::Base64(_)), "escapes cost more than base64");
        assert!(matches!(Body::encode("\u{ffff}aaaaaaaaaaaaaaa".as_bytes()), Body::Base64(_)));
    }

    #[test]
    fn a_text_chunk_of_any_kind_fits_a_message() {
        for byte in [b'a', b'"', b'\n', 0x01, 0xff] {
            let bytes = vec![byte; CHUNK_BYTES];
            let (body, taken) = Body::encode_front(&bytes, None);
            assert_eq!(taken, CHUNK_BYTES);
            assert!(serde_json::to_string(&body).unwrap().len() <= MESSAGE_BYTES - 900, "{byte}");
        }
    }

    #[test]
    fn compresses_more_into_one_message_and_never_makes_it_longer() {
        let text = b"the same line again and again\n".repeat(20_000);
        let (body, taken) = Body::encode_front(&text, Some(Codec::Zstd));
        assert!(matches!(body, Body::Zstd(_)));
        assert_eq!(taken, COMPRESSED_CHUNK_BYTES);
        assert_eq!(body.decode().unwrap(), text[..taken]);
        let noise: Vec<u8> = (0..200_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let (body, taken) = Body::encode_front(&noise, Some(Codec::Zstd));
        assert!(taken <= CHUNK_BYTES || matches!(body, Body::Zstd(_)));
    }

    #[test]
    fn a_compressed_lie_costs_nothing() {
        let bomb = zstd::bulk::compress(&vec![0; COMPRESSED_CHUNK_BYTES + 1], 19).unwrap();
        assert_eq!(Body::Zstd(STANDARD.encode_to_string(bomb).into()).decode(), Err(BodyError::TooLong));
        let full = zstd::bulk::compress(&vec![0; COMPRESSED_CHUNK_BYTES], 19).unwrap();
        assert_eq!(
            Body::Zstd(STANDARD.encode_to_string(full).into()).decode().unwrap().len(),
            COMPRESSED_CHUNK_BYTES
        );
        assert_eq!(Body::Zstd("AAAA".into()).decode(), Err(BodyError::Zstd));
        // Cut off, without padding, with bits left over, with what is no digit.
        for wrong in [
            "A", "QQ", "QQ=", "QR==", "QUJ=", "Q=Q=", "====", "QQ==QQ==", " QQ==", "QQ==\n", "Q_==",
            "\u{e9}A=",
        ] {
            assert_eq!(Body::Base64(wrong.into()).decode(), Err(BodyError::Base64), "{wrong:?}");
        }
    }

    #[test]
    fn only_text_that_is_not_yet_encoded_is_compressed() {
        assert!(is_compressible(Some("text/html; charset=utf-8"), None));
        assert!(is_compressible(Some("application/problem+json"), Some("identity")));
        assert!(!is_compressible(Some("text/html"), Some("gzip")));
        assert!(!is_compressible(Some("image/png"), None));
        assert!(!is_compressible(None, None));
    }

    proptest! {
        #[test]
        fn any_bytes_survive(bytes in proptest::collection::vec(any::<u8>(), 0..3000), compress: bool) {
            let (body, taken) = Body::encode_front(&bytes, compress.then_some(Codec::Zstd));
            let json = serde_json::to_string(&body).unwrap();
            let back: Body<'_> = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(back.decode().unwrap(), &bytes[..taken]);
        }

        #[test]
        fn any_text_survives(text in "\\PC{0,300}") {
            let json = serde_json::to_string(&Body::encode(text.as_bytes())).unwrap();
            prop_assert_eq!(serde_json::from_str::<Body<'_>>(&json).unwrap().decode().unwrap(), text.as_bytes());
        }
    }
}
