//! Messages of agents that nobody thought of one by one.

use super::*;

/// The seeds of everything that is generated here; a failure names its own.
const SEED: u64 = 0x7475_6e6e_656c;

/// The splitmix64 generator: the same numbers in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % sides as u64).unwrap()
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.roll(of.len())]
    }
}

/// What has to become of a hostile message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// The request it claims to answer ends with 502.
    Invalid,
    /// It is as if it had never been sent.
    Dropped,
}

/// A message of an agent that means no good, made from what the dice say; `token` is one of a live request.
fn hostile_message(dice: &mut Dice, token: &str) -> (String, Fate) {
    let reply = |rest: &str| format!(r#"{{"type":"reply","token":"{token}",{rest}}}"#);
    let invalid = |text: String| (text, Fate::Invalid);
    let dropped = |text: String| (text, Fate::Dropped);
    match dice.roll(14) {
        0 => {
            let status = dice.pick(&[
                "999", "0", "-1", "100", "199", "600", "65536", "1e3", "\"200\"", "null", "[200]", "200.5",
            ]);
            invalid(reply(&format!(r#""status":{status},"headers":[],"end":true"#)))
        }
        1 => {
            let evil = dice.pick(&[
                "\\r\\n", "\\n", "\\r", "\\u0000", "\\u007f", "\\u0001", "\\u001b", "\\u2028", "\\ud800",
            ]);
            let at = dice.roll(3);
            let value = ["", "x", "Set-Cookie: evil=1"].map(|part| format!("{part}{evil}"))[at].clone();
            invalid(reply(&format!(r#""status":200,"headers":[["x-evil","{value}evil: 1"]],"end":true"#)))
        }
        2 => {
            let name = dice.pick(&[
                "", " ", "a b", "a:", "a\\r\\nb", "a\\u0000", "(a)", "a\\tb", "\\u00e9", "a/b", "a\\\"b",
            ]);
            invalid(reply(&format!(r#""status":200,"headers":[["{name}","x"]],"end":true"#)))
        }
        3 => {
            let count = limits::HEADER_FIELDS + 1 + dice.roll(3000);
            let many = vec![r#"["a","b"]"#; count].join(",");
            invalid(reply(&format!(r#""status":200,"headers":[{many}],"end":true"#)))
        }
        4 => {
            let long = "x".repeat(limits::HEAD_BYTES + dice.roll(4000));
            invalid(reply(&format!(r#""status":200,"headers":[["a","{long}"]],"end":true"#)))
        }
        5 => {
            let body = dice.pick(&[
                r#"{"base64":"%%%"}"#,
                r#"{"base64":"eA"}"#,
                r#"{"base64":"eA=="  ,"text":"x"}"#,
                r#"{"base64":5}"#,
                r#"{"zstd":"AAAA"}"#,
                r#"{"zstd":"KLUv/aAAAAYAAgAQAAIAEAADABAA"}"#,
                r#"{"brotli":"AAAA"}"#,
                r#"{}"#,
                r#""text""#,
                "[]",
                "7",
            ]);
            invalid(reply(&format!(r#""status":200,"headers":[],"body":{body},"end":true"#)))
        }
        6 => {
            let seq = dice.pick(&["0", "-1", "4294967296", "4000", "4294967295", "1.5", "\"1\"", "null"]);
            invalid(format!(r#"{{"type":"chunk","token":"{token}","seq":{seq},"end":true}}"#))
        }
        7 => {
            let code = dice.pick(&["x", "", "EdgeFailed", "edge_failed ", "200"]);
            invalid(format!(r#"{{"type":"failed","token":"{token}","seq":0,"code":"{code}"}}"#))
        }
        8 => {
            let rest = dice.pick(&[
                r#""status":200"#,
                r#""headers":[]"#,
                r#""status":200,"headers":{}"#,
                r#""status":200,"headers":[["a"]],"end":true"#,
                r#""status":200,"headers":[["a","b","c"]],"end":true"#,
                r#""status":200,"headers":[{"a":"b"}],"end":true"#,
                r#""status":200,"headers":[],"end":"yes""#,
                r#""status":200,"status":200,"headers":[],"end":true"#,
            ]);
            invalid(reply(rest))
        }
        9 => {
            // A token that is almost the one.
            let mut bytes = token.as_bytes().to_vec();
            let at = dice.roll(bytes.len() - 1);
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let near = String::from_utf8(bytes).unwrap();
            dropped(format!(r#"{{"type":"reply","token":"{near}","status":200,"headers":[],"end":true}}"#))
        }
        10 => {
            let cut = &token[..dice.roll(token.len() - 1)];
            dropped(format!(r#"{{"type":"chunk","token":"{cut}","seq":1,"end":true}}"#))
        }
        11 => {
            let kind = dice
                .pick(&["dance", "", "request", "welcome", "cancel", "credit", "Reply", "reply ", "connect"]);
            dropped(format!(r#"{{"type":"{kind}","token":"{token}","status":200,"headers":[],"end":true}}"#))
        }
        12 => {
            let noise: String = (0..dice.roll(300))
                .map(|_| char::from(b' ' + u8::try_from(dice.roll(95)).unwrap()))
                .collect();
            dropped(noise)
        }
        _ => {
            // A good reply, broken off somewhere in the middle of its JSON.
            let good = reply(r#""status":200,"headers":[["a","b"]],"body":{"text":"x"},"end":true"#);
            dropped(good[..1 + dice.roll(good.len() - 2)].to_owned())
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_hostile_messages_harm_nobody() {
    const MESSAGES: usize = 240;
    let upstream = Upstream::echo().await;
    let local = Local::start(&[]);
    let bob = local.token_file(&local.issue("bob", &["good"]));
    let tunnel = format!("[[tunnel]]\nname = \"good\"\nupstream = \"{}\"\n", upstream.address());
    let _bob = local.agent_of(&bob, &[], &tunnel, &["good"]);
    let mut mallory = RawAgent::with(&local, &local.issue("mallory", &["bad"])).await;
    mallory.hello(&["bad"]).await;
    let (stop, good) = good_traffic(&local, "good");
    let mut counts = [0, 0];
    for round in 0..MESSAGES {
        let asked = ask(&local, "bad", "/");
        let call = mallory.request().await;
        let (text, fate) = hostile_message(&mut Dice(SEED + round as u64), &call.token);
        mallory.say_text(&text).await;
        let shown = text.chars().take(300).collect::<String>().replace(&call.token, "TOKEN");
        if fate == Fate::Dropped {
            mallory.say(call.reply("own", true)).await;
        }
        let answer = asked.await.unwrap();
        let seen = (answer.status, answer.field("x-tunnel-error"));
        let wanted = match fate {
            Fate::Invalid => (502, Some("agent_invalid".to_owned())),
            Fate::Dropped => (200, None),
        };
        assert_eq!(seen, wanted, "round {round}: {shown}: {}", answer.text());
        assert!(answer.field("x-evil").is_none() && answer.field("set-cookie").is_none(), "round {round}");
        counts[fate as usize] += 1;
        if fate == Fate::Invalid {
            let word = format!(r#"{{"type":"failed","token":"{}","seq":0,"code":"cancelled"}}"#, call.token);
            mallory.say_text(&word).await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let done = good.await.unwrap();
    assert!(done > MESSAGES / 4, "only {done} good requests beside {MESSAGES} hostile messages");
    assert!(counts.iter().all(|&count| count > 40), "{counts:?}");
    let printed = local.process().printed();
    assert!(!printed.contains("panicked"), "{printed}");
    assert!(printed.contains("agent's answer is invalid") && printed.contains("agent's message was dropped"));
}
