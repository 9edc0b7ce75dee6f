//! What compression on the link saves and costs: text of several sizes, as one message would carry it.

use std::time::{Duration, Instant};

use proto::body::{Body, Codec};

use crate::figures::{Report, Unit};

/// The sizes of text, in bytes.
const SIZES: [usize; 8] = [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536];

/// For how long one size is encoded and decoded again and again.
const TIME: Duration = Duration::from_millis(60);

/// An answer of some API: the same keys again and again, values that differ.
fn text(bytes: usize) -> Vec<u8> {
    let noise = tests::noise(7, bytes);
    let mut text = String::with_capacity(bytes + 200);
    text.push('[');
    for (index, chunk) in noise.chunks_exact(8).enumerate() {
        let id = u64::from_le_bytes(chunk.try_into().unwrap_or_default());
        text.push_str(&format!(
            "{{\"id\":{},\"name\":\"item {index}\",\"owner\":\"{:04x}\",\"is_open\":{},\"tags\":[\"alpha\",\"beta\"]}},",
            id % 100_000,
            id >> 48,
            id % 3 == 0,
        ));
        if text.len() >= bytes {
            break;
        }
    }
    text.truncate(bytes);
    text.into_bytes()
}

/// Bytes of the body inside its message, and microseconds of CPU for encoding and decoding it.
fn cost(text: &[u8], codec: Option<Codec>) -> anyhow::Result<(f64, f64)> {
    let encode = || serde_json::to_string(&Body::encode_front(text, codec).0);
    let message = encode()?;
    let begun = Instant::now();
    let mut times = 0_u32;
    while begun.elapsed() < TIME {
        let message = encode()?;
        let decoded = serde_json::from_str::<Body<'_>>(&message)?.decode()?;
        anyhow::ensure!(decoded == text, "a body changed on its way");
        times += 1;
    }
    Ok((message.len() as f64, begun.elapsed().as_secs_f64() * 1e6 / f64::from(times)))
}

/// Measures every size without (as "direct") and with (as "tunnel") the codec.
pub(crate) fn measure(report: &mut Report) -> anyhow::Result<()> {
    for size in SIZES {
        let text = text(size);
        let (plain_bytes, plain_time) = cost(&text, None)?;
        let (bytes, time) = cost(&text, Some(Codec::Zstd))?;
        report.note(
            format!("compression: {size} B of JSON in a message, plain and zstd"),
            Unit::Bytes,
            None,
            Some(plain_bytes),
            bytes,
        );
        report.note(
            format!("compression: CPU of encoding and decoding {size} B, plain and zstd"),
            Unit::Micros,
            None,
            Some(plain_time),
            time,
        );
    }
    Ok(())
}
