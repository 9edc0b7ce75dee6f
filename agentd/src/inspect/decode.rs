//! Undoes a content coding for display. What passed stays as it is.

use std::io::{self, Read};

use crate::capture::fields::Fields;

/// How much of a decoded body is shown.
const MOST: usize = 2 * 1024 * 1024;

/// What a body looks like without its coding.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub(crate) coding: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// Whether it goes on.
    pub(crate) cut: bool,
    /// Why it ends where it does.
    pub(crate) error: Option<String>,
}

/// Decodes what is kept of a message's body; `None` where that is nothing, or as [`decode`] has it.
pub(crate) fn body(fields: &Fields, kept: &[u8]) -> Option<Decoded> {
    let coding = fields.text("content-encoding").filter(|_| !kept.is_empty())?;
    decode(coding, kept)
}

/// Decodes as far as it goes; `None` where the coding is none, unknown, or several.
fn decode(coding: &str, bytes: &[u8]) -> Option<Decoded> {
    let (coding, reader): (_, Box<dyn Read + '_>) = match coding.trim().to_ascii_lowercase().as_str() {
        "gzip" | "x-gzip" => ("gzip", Box::new(flate2::read::MultiGzDecoder::new(bytes))),
        // RFC 9110 §8.4.1.2 means zlib's format; some send the bare one.
        "deflate" if bytes.first().is_some_and(|first| first & 0x0f == 8) => {
            ("deflate", Box::new(flate2::read::ZlibDecoder::new(bytes)))
        }
        "deflate" => ("deflate", Box::new(flate2::read::DeflateDecoder::new(bytes))),
        "br" => ("br", Box::new(brotli_decompressor::Decompressor::new(bytes, 4096))),
        "zstd" => match zstd::stream::read::Decoder::new(bytes) {
            Ok(decoder) => ("zstd", Box::new(decoder)),
            Err(error) => return Some(failed("zstd", &error)),
        },
        _ => return None,
    };
    let mut decoded = Decoded { coding, bytes: Vec::new(), cut: false, error: None };
    // What was decoded before an error is kept by `read_to_end`.
    if let Err(error) = reader.take(MOST as u64 + 1).read_to_end(&mut decoded.bytes) {
        decoded.error = Some(error.to_string());
    }
    decoded.cut = decoded.bytes.len() > MOST;
    decoded.bytes.truncate(MOST);
    Some(decoded)
}

fn failed(coding: &'static str, error: &io::Error) -> Decoded {
    Decoded { coding, bytes: Vec::new(), cut: false, error: Some(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn each_coding_is_undone() {
        let text = b"hello hello hello hello".repeat(50);
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(&text).unwrap();
        let mut bare = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
        bare.write_all(&text).unwrap();
        for (coding, bytes) in [
            ("gzip", gzip(&text)),
            ("X-Gzip", gzip(&text)),
            ("gzip", [gzip(&text[..500]), gzip(&text[500..])].concat()),
            ("deflate", zlib.finish().unwrap()),
            ("deflate", bare.finish().unwrap()),
            ("zstd", zstd::bulk::compress(&text, 1).unwrap()),
        ] {
            let decoded = decode(coding, &bytes).unwrap();
            assert_eq!((&decoded.bytes, decoded.cut, decoded.error), (&text, false, None), "{coding}");
        }
        // "hello" from the reference encoder.
        let decoded = decode("br", b"\x0b\x02\x80hello\x03").unwrap();
        assert_eq!((&decoded.bytes[..], decoded.error), (&b"hello"[..], None));
        for none in ["identity", "", "gzip, br", "dcb"] {
            assert_eq!(decode(none, b"x"), None);
        }
    }

    #[test]
    fn what_is_cut_broken_or_a_bomb_ends_with_a_reason() {
        let whole = gzip(&(0..50_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>());
        let cut = decode("gzip", &whole[..whole.len() / 2]).unwrap();
        assert!(cut.bytes.len() > 1000 && cut.error.is_some());
        assert!(decode("br", b"\xff\xff\xff").unwrap().error.is_some());
        assert!(decode("zstd", b"nonsense").unwrap().error.is_some());
        let bomb = decode("gzip", &gzip(&vec![0; 64 << 20])).unwrap();
        assert_eq!((bomb.bytes.len(), bomb.cut, bomb.error), (MOST, true, None));
    }
}
