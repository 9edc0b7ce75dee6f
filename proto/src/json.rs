//! Long texts as JSON strings. Enters: a text. Leaves: the string that serde_json writes for it, to the byte.
//!
//! serde_json looks for what is to be escaped one byte after the other, which is most of its work for a body. Here a run of
//! bytes is looked at together.

/// How long a run is: few enough that vector registers hold it.
const RUN: usize = 64;

/// Appends `text` as a string, quotes included.
pub fn push_string(json: &mut Vec<u8>, text: &str) {
    json.reserve(text.len() + 2);
    json.push(b'"');
    let (runs, rest) = text.as_bytes().as_chunks::<RUN>();
    for run in runs {
        if run.iter().fold(false, |any, &byte| any | is_escaped(byte)) {
            push_escaped(json, run);
        } else {
            json.extend_from_slice(run);
        }
    }
    push_escaped(json, rest);
    json.push(b'"');
}

/// Appends a field to the object that `json` ends with, which has one already; `push` appends its value.
pub fn push_field(json: &mut Vec<u8>, name: &str, push: impl FnOnce(&mut Vec<u8>)) {
    // The brace, which comes after the field.
    json.pop();
    json.push(b',');
    push_string(json, name);
    json.push(b':');
    push(json);
    json.push(b'}');
}

const fn is_escaped(byte: u8) -> bool {
    (byte < 0x20) | (byte == b'"') | (byte == b'\\')
}

fn push_escaped(json: &mut Vec<u8>, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for &byte in bytes {
        let short = match byte {
            b'"' | b'\\' => byte,
            0x08 => b'b',
            b'\t' => b't',
            b'\n' => b'n',
            0x0c => b'f',
            b'\r' => b'r',
            0..0x20 => {
                json.extend_from_slice(b"\\u00");
                json.push(DIGITS[usize::from(byte >> 4)]);
                json.push(DIGITS[usize::from(byte & 15)]);
                continue;
            }
            _ => {
                json.push(byte);
                continue;
            }
        };
        json.extend_from_slice(&[b'\\', short]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pushed(text: &str) -> String {
        let mut json = b"[".to_vec();
        push_string(&mut json, text);
        String::from_utf8(json).unwrap()
    }

    #[test]
    fn every_character_is_written_as_serde_json_writes_it() {
        let all: String = (0..=0x250).chain([0x2028, 0xffff, 0x1_f600]).filter_map(char::from_u32).collect();
        assert_eq!(pushed(&all), format!("[{}", serde_json::to_string(&all).unwrap()));
        assert_eq!(pushed(""), "[\"\"");
    }

    proptest! {
        #[test]
        fn what_is_to_be_escaped_may_stand_anywhere(
            texts in proptest::collection::vec("(\\PC|[\\x00-\\x22\\x5c]){0,3}[a-z/+]{0,200}", 0..6)
        ) {
            let text = texts.concat();
            prop_assert_eq!(pushed(&text), format!("[{}", serde_json::to_string(&text).unwrap()));
        }
    }
}
