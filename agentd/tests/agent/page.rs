//! The inspector's page in a real browser: what passes shows up, is read and sent again, and stays text whatever it is.

use std::sync::Mutex;

use futures_util::StreamExt as _;
use http::header::AUTHORIZATION;
use proto::{
    body::Body,
    delivery::{Answer, Ask, DeliveriesAnswer, Last, State, Summary},
    header::Headers,
    id::DeliveryId,
    message::{AgentMessage, EdgeMessage, Request},
};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use crate::{
    chromium::Chromium,
    inspector::{Inspected, hostile},
    stage::{Line, request, with_body, with_header},
};

const JSON: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{\"ok\":true,\"n\":12.0}";

fn posted(target: &str, body: &[u8]) -> Request<'static> {
    with_header(with_body(request("POST", target), body), "content-type", b"application/json")
}

/// The bodies' views, tried in the browser that will run them.
const VIEWS: &str = r#"(async () => {
    const views = await import('/body.js');
    const bytes = (text) => new TextEncoder().encode(text);
    const laid = (text) => views.prettyJson(text)?.map(([, piece]) => piece).join('') ?? null;
    const is = (what, got, wanted) => {
        if (JSON.stringify(got) !== JSON.stringify(wanted)) throw new Error(`${what}: ${JSON.stringify(got)}`);
    };
    is('numbers and repeated names stay', laid('{"a":12345678901234567890,"a":1.0e2,"b":[]}'),
        '{\n  "a": 12345678901234567890,\n  "a": 1.0e2,\n  "b": []\n}');
    is('escapes stay', laid('["\\u003c","\\"]{"]'), '[\n  "\\u003c",\n  "\\"]{"\n]');
    is('no JSON', [laid('{"a":'), laid('x')], [null, null]);
    is('deep', laid('['.repeat(3000) + ']'.repeat(3000)) !== null, true);
    is('a form', views.formFields('a=1+2&b=%C3%A4&c&=d&e=%zz'), [['a', '1 2'], ['b', 'ä'], ['c', ''], ['', 'd'], ['e', '%zz']]);
    const parts = views.multipart(bytes('--x\r\ncontent-disposition: form-data; name="a\\"b"; filename="f"\r\n\r\none\r\n--x\r\n\r\ntwo\r\n--x--\r\n'), 'x');
    is('parts', parts.map((part) => [part.name, part.file, views.asText(part.bytes).text, part.cut]), [['a"b', 'f', 'one', false], ['', '', 'two', false]]);
    is('a part that is cut', views.multipart(bytes('--x\r\n\r\nhal'), 'x').map((part) => [views.asText(part.bytes).text, part.cut]), [['hal', true]]);
    const latin = new Uint8Array([0x7b, 0x22, 0xe4, 0x22, 0x3a, 0x22, 0x80, 0x22, 0x7d]);
    const read = (bytes, type) => views.asText(bytes, views.charsetOf(bytes, type));
    for (const label of ['ISO-8859-1', '"windows-1252"']) is(label, read(latin, `text/plain; charset=${label}`), {text: '{"ä":"€"}', valid: true});
    is('no charset is UTF-8', [read(latin, 'text/plain').valid, read(latin, 'text/plain; charset=nonsense').valid], [false, false]);
    is('JSON in one', views.viewsOf(latin, 'application/json; charset=latin1'), ['json', 'text', 'hex']);
    is('shift_jis', read(new Uint8Array([0x93, 0xfa, 0x96, 0x7b]), 'text/plain;charset=Shift_JIS').text, '日本');
    const wide = new Uint8Array([0xfe, 0xff, 0, 0x68, 0, 0x69]);
    is('a byte order mark goes before', [read(wide, 'text/plain; charset=utf-16').text, views.charsetOf(wide, 'text/html'), views.charsetOf(wide, 'image/png')], ['\ufeffhi', 'utf-16be', 'utf-8']);
    is('utf-16 is text', views.viewsOf(new Uint8Array([0x68, 0, 0x69, 0]), 'text/plain; charset=utf-16'), ['text', 'hex']);
    is('what is none is not', views.viewsOf(new Uint8Array([1, 0, 0, 0]), 'text/plain; charset=utf-16le'), ['hex', 'text']);
    is('a form in one', views.formFields('a=%E4+%80&b=%81%7E', 'windows-1252'), [['a', 'ä €'], ['b', '\u0081~']]);
    is('events', views.streamEvents(bytes(': hi\n\nevent: a\ndata: 1\r\ndata: 2\r\nid: 7\n\ndata: x')).map((event) => [event.name, event.id, event.data, event.whole]),
        [['a', '7', '1\n2', true], ['', '', 'x', false]]);
    is('hex', views.hexRows(new Uint8Array([0, 65, 255]), 0, 8), [['00000000', '00 41 ff'.padEnd(48), '·A·']]);
    is('what fits', [views.viewsOf(bytes('{}'), 'text/plain'), views.viewsOf(new Uint8Array([0, 1]), 'image/png'), views.viewsOf(bytes('a=b'), 'application/x-www-form-urlencoded')],
        [['json', 'text', 'hex'], ['image', 'hex', 'text'], ['form', 'text', 'hex']]);
    const edited = (text, change, caret) => {
        const before = text.replace(/\r\n?/g, '\n');
        return views.withLineEnds(text, before, change(before), caret);
    };
    const put = (at, more) => [(text) => text.slice(0, at) + more + text.slice(at), at + more.length];
    is('line ends stay', edited('a\r\nb\nc\rd\r\n', (text) => text.replace('b', 'BB')), 'a\r\nBB\nc\rd\r\n');
    is('new ones are of their line', [edited('a\r\nb\nc\r\n', ...put(1, '\nx')), edited('a\r\nb\nc\r\n', ...put(3, '\nx')), edited('b\n\r\nc', ...put(1, '\n')), edited('a\r\nb', ...put(3, '\nc'))],
        ['a\r\nx\r\nb\nc\r\n', 'a\r\nb\nx\nc\r\n', 'b\n\n\r\nc', 'a\r\nb\r\nc']);
    is('what goes', [edited('a\r\nb\nc\r\n', (text) => text.replace('b\n', '')), edited('a\r\nb\r\n', () => ''), edited('\r\n\n', (text) => text.slice(1)), edited('aa', () => 'a')], ['a\r\nc\r\n', '', '\r\n', 'a']);
    return 'ok';
})()"#;

/// What would be there if a capture had become markup, or had run.
const MARKUP: &str = "document.querySelectorAll('main script, main style, main img, main svg, main a, main object, \
    main embed, main form:not(#filters), main video, main base, main meta, main iframe:not(.image), \
    main iframe:not([sandbox=\"\"])').length + Number('owned' in window)";

#[tokio::test]
async fn requests_show_up_are_read_and_sent_again_and_stay_text() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    let page = format!("http://{}/", stage.address);
    browser.open(&page).await;
    browser.wait_for("document.querySelector('#live')?.textContent === 'live'").await;
    browser.wait_for("document.querySelector('#empty h2')?.textContent.includes('first request')").await;
    assert_eq!(browser.evaluate(VIEWS).await, "ok");

    // Three requests, three rows, one opened.
    for target in ["/first", "/second?x=1", "/hook"] {
        stage.pass(posted(target, b"{\"event\":\"paid\",\"amount\":12345678901234567890}"), JSON).await;
    }
    browser.wait_for("document.querySelectorAll('#space .row').length === 3").await;
    browser
        .wait_for("document.querySelector('.row[aria-rowindex=\"1\"] .target')?.textContent === '/hook'")
        .await;
    browser.press("j").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'POST /hook'").await;
    browser.wait_for("document.querySelector('#detail').innerText.includes('12345678901234567890')").await;

    // Sent again: the upstream gets it, the fourth row is there, and the answers are compared.
    browser.press("r").await;
    let mut peer = stage.upstream.accept().await;
    let head = peer.head().await;
    assert!(head.contains("POST /hook ") && head.contains("x-tunnel-replay: 3"), "{head}");
    peer.bytes(46).await;
    peer.write(b"HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n{\"ok\":false}").await;
    drop(peer);
    browser.wait_for("document.querySelectorAll('#space .row').length === 4").await;
    browser.wait_for("document.querySelector('.diff')?.innerText.includes('/ok')").await;
    let diff = browser.evaluate("document.querySelector('.diff').innerText").await;
    let diff = diff.as_str().unwrap();
    assert!(diff.contains("202") && diff.contains("/n") && diff.contains("12.0"), "{diff}");

    // Edited: only what was touched is another.
    browser.press("e").await;
    browser.wait_for("document.querySelector('#edit[open] .target') !== null").await;
    browser.evaluate("{ const target = document.querySelector('#edit .target'); target.value = '/edited'; document.querySelector('#edit form').requestSubmit(); }").await;
    let mut peer = stage.upstream.accept().await;
    let head = peer.head().await;
    assert!(head.contains("POST /edited ") && head.contains("content-length: 46"), "{head}");
    peer.bytes(46).await;
    peer.write(JSON).await;
    drop(peer);
    browser.wait_for("document.querySelectorAll('#space .row').length === 5").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'POST /edited'").await;

    // Filters are the server's: what they leave is listed, and what is wrong with them is said.
    let set = |field: &str, value: &str| {
        format!(
            "{{ const field = document.querySelector('#{field}'); field.value = '{value}'; field.dispatchEvent(new Event('input', {{bubbles: true}})); }}"
        )
    };
    browser.evaluate(&set("path", "/edited")).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    browser.evaluate(&set("status", "many")).await;
    browser.wait_for("!document.querySelector('#filter-error').hidden").await;
    browser.evaluate(&(set("path", "") + &set("status", ""))).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 5").await;

    // Whatever is captured is text.
    let cases = hostile();
    for case in &cases {
        let field: Vec<u8> =
            case.iter().copied().filter(|byte| *byte >= b' ' && *byte != 0x7f).take(8000).collect();
        let sent = with_header(posted("/hostile", case), "x-hostile", &field);
        let mut answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: image/svg+xml\r\ncontent-length: {}\r\nx-hostile: ",
            case.len()
        )
        .into_bytes();
        answer.extend(field);
        answer.extend(b"\r\n\r\n");
        answer.extend(case);
        stage.pass(sent, &answer).await;
    }
    let last = 5 + cases.len();
    let first = 6;
    browser.wait_for(&format!("document.querySelector('#row-{last}') !== null")).await;
    for id in first..=last {
        browser.evaluate(&format!("location.hash = '#{id}'")).await;
        browser
            .wait_for(&format!("document.querySelector('#detail .facts')?.innerText.includes('#{id}')"))
            .await;
        let views = browser
            .evaluate("document.querySelectorAll('#detail [role=tab]').length")
            .await
            .as_u64()
            .unwrap();
        for view in 0..views {
            browser
                .evaluate(&format!("document.querySelectorAll('#detail [role=tab]')[{view}]?.click()"))
                .await;
        }
        assert_eq!(browser.evaluate(MARKUP).await, 0, "case {}", id - first);
    }
    assert_eq!(browser.evaluate("violations").await, json!([]), "the policy had to stop something");

    let strangers: Vec<&str> = browser
        .asked()
        .filter(|url| !url.starts_with(&page) && !url.starts_with("data:") && *url != "about:srcdoc")
        .collect();
    assert!(strangers.is_empty(), "{strangers:?}");
    assert!(browser.asked().any(|url| url.ends_with("/page.js")));
    let wrong = |event: &&serde_json::Value| {
        event["method"] == "Runtime.exceptionThrown"
            || event["method"] == "Log.entryAdded" && event["params"]["entry"]["level"] == "error"
            // The filter that is no status was refused, as it should be.
            && event["params"]["entry"]["networkRequestId"].is_null()
    };
    let wrong: Vec<_> = browser.events.iter().filter(wrong).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    browser.close().await;
}

#[tokio::test]
async fn more_tabs_than_a_browser_has_connections_are_live_when_they_are_seen() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    let page = format!("http://{}/", stage.address);
    let rows = |count: usize| format!("document.querySelectorAll('#space .row').length === {count}");
    let mut tabs = Vec::new();
    for _ in 0..8 {
        tabs.push(browser.new_tab().await);
        browser.open(&page).await;
        browser.wait_for("document.querySelector('#live')?.textContent === 'live'").await;
    }
    // The one that is seen hears, and so does the one that was hidden last, which says so in its title.
    stage.pass(posted("/first", b"{}"), JSON).await;
    browser.wait_for(&rows(1)).await;
    browser.turn_to(&tabs[6]);
    browser.wait_for("document.title.startsWith('(1) ')").await;
    // Each has what it missed when it is looked at, hears what comes then, and gives its connection back.
    for (seen, tab) in tabs.iter().enumerate() {
        browser.look_at(tab).await;
        browser.wait_for(&rows(seen + 1)).await;
        assert_eq!(browser.evaluate("document.title").await, "Requests · agentd");
        stage.pass(posted("/more", b"{}"), JSON).await;
        browser.wait_for(&rows(seen + 2)).await;
    }
    browser.close().await;
}

#[tokio::test]
async fn a_comparison_names_the_errors_of_both_sides() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    stage.line.request(&request("GET", "/")).await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    drop(peer);
    stage.line.failure().await;
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    let cells = |cells: &[&str]| {
        let found = "Array.from(document.querySelectorAll('.diff tbody tr:first-child > *'), (cell) => cell.innerText)";
        format!("JSON.stringify({found}) === '{}'", json!(cells))
    };
    browser.press("j").await;
    // Each is sent again as it was, and compared with the one before.
    for (id, answer, before, after) in [
        (1, &b"NONSENSE\r\n\r\n"[..], "upstream_reset", "upstream_invalid"),
        (2, JSON, "upstream_invalid", "none"),
    ] {
        browser
            .wait_for(&format!("document.querySelector('#detail .facts')?.innerText.includes('#{id}')"))
            .await;
        browser.press("r").await;
        let mut peer = stage.upstream.accept().await;
        peer.head().await;
        peer.write(answer).await;
        drop(peer);
        browser.wait_for(&cells(&["error", before, after])).await;
    }
    browser.close().await;
}

#[tokio::test]
async fn who_leaves_the_search_keeps_it() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    for target in ["/one", "/two"] {
        stage.pass(posted(target, b"{}"), JSON).await;
    }
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 2").await;
    browser.press("/").await;
    browser.command("Input.insertText", json!({"text": "two"})).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    for kind in ["keyDown", "keyUp"] {
        let escape = json!({"type": kind, "key": "Escape", "windowsVirtualKeyCode": 27});
        browser.command("Input.dispatchKeyEvent", escape).await;
    }
    let left = "[document.activeElement.id, document.querySelector('#text').value]";
    assert_eq!(browser.evaluate(left).await, json!(["list", "two"]));
    browser.close().await;
}

#[tokio::test]
async fn the_oldest_of_all_is_reached_at_once() {
    let Some(mut browser) = Chromium::start().await else { return };
    let stage = Inspected::start(&[]).await;
    let page = format!("http://{}/", stage.address);
    browser.open(&page).await;
    browser.wait_for("document.querySelector('#live')?.textContent === 'live'").await;
    let import = "fetch('/api/import', {
        method: 'POST',
        headers: {'content-type': 'application/json', 'x-inspector-token': document.querySelector('meta[name=token]').content},
        body: JSON.stringify({log: {entries: Array.from({length: 1200}, (_, at) => ({request: {method: 'GET', url: `http://h/${at + 1}`}}))}}),
    }).then((answer) => answer.status)";
    assert_eq!(browser.evaluate(import).await, 201);
    browser.open("about:blank").await;
    browser.open(&page).await;
    browser.wait_for("document.querySelector('#count')?.textContent === '500+'").await;
    browser.press("G").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'GET /1'").await;
    browser.wait_for("document.querySelector('#count').textContent === '1,200'").await;
    browser.press("g").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'GET /1200'").await;
    browser.close().await;
}

#[tokio::test]
async fn a_text_is_shown_in_its_own_charset() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    let body = b"{\"na\xefve\": true}";
    let sent = with_header(
        with_body(request("POST", "/"), body),
        "content-type",
        b"application/json; charset=iso-8859-1",
    );
    stage.pass(sent, b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=shift_jis\r\ncontent-length: 4\r\n\r\n\x93\xfa\x96\x7b").await;
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    browser.press("j").await;
    browser
        .wait_for("document.querySelector('#detail .payload[data-side=response] pre')?.innerText === '日本'")
        .await;
    let sent =
        browser.evaluate("document.querySelector('#detail .payload[data-side=request]').innerText").await;
    let sent = sent.as_str().unwrap();
    assert!(sent.contains("\"naïve\": true") && sent.contains("windows-1252"), "{sent}");
    // The editor writes UTF-8, and so leaves it alone.
    browser.press("e").await;
    browser.wait_for("document.querySelector('#edit[open] textarea') !== null").await;
    browser.evaluate("document.querySelector('#edit form').requestSubmit()").await;
    let mut peer = stage.upstream.accept().await;
    peer.head().await;
    assert_eq!(peer.bytes(body.len()).await, body);
    peer.write(JSON).await;
    browser.close().await;
}

#[tokio::test]
async fn the_rows_of_several_tunnels_are_as_wide_as_the_list() {
    let Some(mut browser) = Chromium::start().await else { return };
    let second = "inspect = true\n[[tunnel]]\nname = \"other\"\nupstream = {upstream}\ninspect = true";
    let mut stage = Inspected::daemon(second).await;
    stage.pass(posted("/first", b"{}"), JSON).await;
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelector('#space .row .tunnel')?.textContent === 'web'").await;
    for width in [1300, 500] {
        let size = json!({"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false});
        browser.command("Emulation.setDeviceMetricsOverride", size).await;
        let shares = "['.row', '.row .target'].map((part) => \
            document.querySelector(part).offsetWidth / document.querySelector('#list').offsetWidth)";
        let shares = browser.evaluate(shares).await;
        let share = |at: usize| shares[at].as_f64().unwrap();
        assert!(share(0) > 0.9 && share(1) > 0.1, "{width}: {shares}");
    }
    browser.close().await;
}

#[tokio::test]
async fn what_was_revealed_is_forgotten_with_the_process_that_had_it() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::daemon("inspect = true").await;
    let secret = |target, cookie| with_header(posted(target, b"{}"), "cookie", cookie);
    stage.pass(secret("/first", b"sid=FIRST"), JSON).await;
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    browser.press("j").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'POST /first'").await;
    browser.press("v").await;
    browser.wait_for("document.querySelector('#detail').innerText.includes('sid=FIRST')").await;
    // Another process has another request under the same number.
    stage.restart().await;
    stage.pass(secret("/second", b"sid=SECOND"), JSON).await;
    browser.wait_for("document.querySelector('#space .row .target')?.textContent === '/second'").await;
    browser.wait_for("document.querySelector('#detail h2') === null").await;
    browser.press("j").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'POST /second'").await;
    let shown = browser.evaluate("document.querySelector('#detail').innerText").await;
    let shown = shown.as_str().unwrap();
    assert!(shown.contains("cookie") && !shown.contains("SECOND"), "{shown}");
    // The token of the new process is known.
    browser.press("v").await;
    browser.wait_for("document.querySelector('#detail').innerText.includes('sid=SECOND')").await;
    browser.close().await;
}

#[tokio::test]
async fn the_editor_leaves_alone_what_nobody_touched() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    let mut sent = with_body(request("POST", "/edited"), b"one\r\ntwo\nthree\r\n");
    for value in [&b"first"[..], b"second"] {
        sent = with_header(sent, "x-api-key", value);
    }
    stage.pass(sent, JSON).await;
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelectorAll('#space .row').length === 1").await;
    browser.press("j").await;
    browser.wait_for("document.querySelector('#detail h2')?.textContent === 'POST /edited'").await;
    browser.press("e").await;
    browser.wait_for("document.querySelector('#edit[open] .target') !== null").await;
    let edits = "{
        const rows = [...document.querySelectorAll('#edit .rows .row')];
        rows.find((row) => row.querySelector('.name').value === 'x-api-key').querySelector('button').click();
        const area = document.querySelector('#edit textarea');
        for (const [old, other] of [['one', '1'], ['three', '3']]) {
            area.value = area.value.replace(old, other);
            area.dispatchEvent(new Event('input', {bubbles: true}));
        }
        document.querySelector('#edit form').requestSubmit();
    }";
    browser.evaluate(edits).await;
    let mut peer = stage.upstream.accept().await;
    let head = peer.head().await;
    assert!(head.contains("\r\nx-api-key: second\r\n") && !head.contains("first"), "{head}");
    assert!(head.contains("content-length: 10"), "{head}");
    assert_eq!(peer.bytes(10).await, b"1\r\ntwo\n3\r\n");
    peer.write(JSON).await;
    browser.close().await;
}

/// An edge that keeps deliveries, and what it was asked to do with them.
#[derive(Default)]
pub(crate) struct Shelf {
    pub(crate) kept: Vec<(Summary, Headers, Vec<u8>)>,
    done: Vec<String>,
}

impl Shelf {
    pub(crate) fn put(&mut self, state: State, target: &str, field: &[u8], body: &[u8]) {
        let number = self.kept.len() as u64 + 1;
        let last = Last {
            attempt: 1,
            at_ms: 1_790_000_000_000,
            status: Some(503),
            code: None,
            reason: format!("the upstream answered 503 {target}"),
        };
        let summary = Summary {
            id: DeliveryId::new(1_790_000_000_000 + number, [1; 10]),
            tunnel: "web".parse().unwrap(),
            state,
            received_ms: 1_790_000_000_000 + number,
            expires_at: 1_790_300_000,
            attempt: 1,
            method: "POST".into(),
            target: target.into(),
            body_bytes: body.len() as u64,
            run: None,
            last: Some(last),
        };
        let value = http::HeaderValue::from_bytes(field).unwrap();
        let secret = http::HeaderValue::from_static("Bearer hunter2");
        let headers = [(http::HeaderName::from_static("x-hostile"), value), (AUTHORIZATION, secret)];
        let headers = headers.into_iter().collect();
        self.kept.push((summary, headers, body.to_vec()));
    }

    fn becomes(&mut self, what: &str, id: &DeliveryId, state: State) -> Answer<'static> {
        self.done.push(format!("{what} {id}"));
        let (summary, ..) = self.kept.iter_mut().find(|(one, ..)| one.id == *id).unwrap();
        summary.state = state;
        Answer::Done { count: 1, cursor: None }
    }

    fn answer(&mut self, ask: Ask) -> Answer<'static> {
        match ask {
            Ask::List { state, .. } => {
                let fits =
                    |one: &&(Summary, Headers, Vec<u8>)| state.is_none_or(|state| one.0.state == state);
                let list = self.kept.iter().rev().filter(fits).map(|(summary, ..)| summary.clone()).collect();
                Answer::Deliveries { list, cursor: None }
            }
            Ask::Show { id, .. } => {
                let (summary, headers, body) = self.kept.iter().find(|(one, ..)| one.id == id).unwrap();
                let summary = Box::new(summary.clone());
                let body = Some(Body::encode(body).into_owned());
                Answer::Delivery { summary, headers: headers.clone(), body, more: None }
            }
            Ask::Retry { id, .. } => self.becomes("retry", &id, State::Waiting),
            Ask::Cancel { id, .. } => self.becomes("cancel", &id, State::Cancelled),
            other => {
                self.done.push(serde_json::to_value(&other).unwrap()["op"].as_str().unwrap().to_owned());
                Answer::Done { count: 0, cursor: None }
            }
        }
    }

    /// Answers for as long as the agent asks.
    pub(crate) async fn serve(shelf: &Mutex<Self>, line: &mut Line) {
        while let Some(Ok(message)) = line.ws.next().await {
            let Message::Text(text) = message else { continue };
            match AgentMessage::decode(&text).unwrap() {
                AgentMessage::Deliveries(asked) => {
                    let answer = shelf.lock().unwrap().answer(asked.ask);
                    line.send(&EdgeMessage::Deliveries(DeliveriesAnswer { seq: asked.seq, answer })).await;
                }
                _ => drop(line.control(&text).await),
            }
        }
        panic!("the agent has gone");
    }
}

/// What would be there if something that is kept had become markup, or had run.
const KEPT_MARKUP: &str = "document.querySelectorAll('#deliveries script, #deliveries style, #deliveries img, #deliveries svg, \
    #deliveries a, #deliveries object, #deliveries embed, #deliveries iframe, #deliveries video, #deliveries base, \
    #deliveries meta').length + Number('owned' in window)";

#[tokio::test]
async fn deliveries_are_listed_read_retried_and_cancelled_and_stay_text() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::daemon("inspect = true\ndelivery = \"durable\"").await;
    let shelf = Mutex::new(Shelf::default());
    let cases = hostile();
    {
        let mut shelf = shelf.lock().unwrap();
        for case in &cases {
            let field: Vec<u8> =
                case.iter().copied().filter(|byte| *byte >= b' ' && *byte != 0x7f).take(8000).collect();
            let target = format!("/{}", String::from_utf8_lossy(&field));
            shelf.put(State::Delivered, &target, &field, case);
        }
        shelf.put(State::Waiting, "/waits", b"x", b"{\"waits\":1}");
        shelf.put(State::Dead, "/dead", b"x", "the body of the dead one: \u{e4}".as_bytes());
    }
    let (page, all) = (format!("http://{}/", stage.address), cases.len() + 2);
    let clicking = async {
        let rows =
            |count: usize| format!("document.querySelectorAll('#delivery-rows tr').length === {count}");
        let click = |row: usize, button: usize| {
            format!(
                "document.querySelectorAll('#delivery-rows tr')[{row}].querySelectorAll('button')[{button}].click()"
            )
        };
        let says =
            |text: &str| format!("document.querySelector('#delivery-rows').innerText.includes('{text}')");
        let filter = |state: &str| {
            format!(
                "{{ const field = document.querySelector('#delivery-state'); field.value = '{state}'; field.dispatchEvent(new Event('change')); }}"
            )
        };
        browser.open(&page).await;
        browser.wait_for("document.querySelector('#deliveries-button')?.hidden === false").await;
        browser.press("q").await;
        browser.wait_for("document.querySelector('#deliveries').open").await;
        browser.wait_for(&rows(all)).await;
        // By state; and one is read.
        browser.evaluate(&filter("dead")).await;
        browser.wait_for(&rows(1)).await;
        browser.evaluate(&click(0, 0)).await;
        browser.wait_for("document.querySelector('#delivery-detail').innerText.includes('the body of the dead one: ä')").await;
        browser.wait_for("document.querySelector('#delivery-detail').innerText.includes('POST /dead')").await;
        // Its secrets are masked until somebody asks for them.
        let shown = "document.querySelector('#delivery-detail').innerText";
        let masked = browser.evaluate(shown).await;
        let masked = masked.as_str().unwrap();
        assert!(masked.contains("authorization") && !masked.contains("hunter2"), "{masked}");
        browser.picture("deliveries.png").await;
        browser.evaluate("document.querySelector('#delivery-detail > button').click()").await;
        browser.wait_for(&format!("{shown}.includes('Bearer hunter2')")).await;
        // Delivered again, and called off.
        browser.evaluate(&click(0, 1)).await;
        browser.wait_for(&says("Nothing is kept")).await;
        browser.evaluate(&filter("waiting")).await;
        browser.wait_for(&rows(2)).await;
        assert!(
            browser.evaluate(&says("/dead")).await == true && browser.evaluate(&says("/waits")).await == true
        );
        browser.evaluate(&click(1, 1)).await;
        browser.wait_for(&rows(1)).await;
        // Above the dialog, which nothing but the top layer is.
        let over = "document.querySelector('#toast').matches(':popover-open') && document.querySelector('#toast').innerText === 'Cancelled'";
        browser.wait_for(over).await;
        browser.picture("deliveries-toast.png").await;
        for button in ["pause", "resume", "dead"] {
            browser.evaluate(&format!("document.querySelector('#delivery-{button}').click()")).await;
        }
        // What is hostile stays text, in the list and read, and leaves the page in its form.
        browser.evaluate(&filter("delivered")).await;
        browser.wait_for(&rows(cases.len())).await;
        let wide = "document.querySelector('#deliveries').scrollWidth > document.querySelector('#deliveries').clientWidth";
        assert_eq!(browser.evaluate(wide).await, false);
        let tall = "Math.max(...Array.from(document.querySelectorAll('#delivery-rows tr'), (row) => row.offsetHeight)) > 60";
        assert_eq!(browser.evaluate(tall).await, false);
        // What was delivered has no body any more, and is not offered to be tried again.
        let offered = "document.querySelectorAll('#delivery-rows td:last-child button').length";
        let empty = cases.iter().filter(|case| case.is_empty()).count();
        assert_eq!(browser.evaluate(offered).await, empty);
        for row in 0..cases.len() {
            browser.evaluate("document.querySelector('#delivery-detail').replaceChildren()").await;
            browser.evaluate(&click(row, 0)).await;
            browser.wait_for("document.querySelector('#delivery-detail h3') !== null").await;
            assert_eq!(browser.evaluate(KEPT_MARKUP).await, 0, "case {row}");
        }
        browser.picture("deliveries-hostile.png").await;
        assert_eq!(browser.evaluate("violations").await, json!([]), "the policy had to stop something");
        let wrong = |event: &&serde_json::Value| {
            event["method"] == "Runtime.exceptionThrown"
                || event["method"] == "Log.entryAdded" && event["params"]["entry"]["level"] == "error"
        };
        let wrong: Vec<_> = browser.events.iter().filter(wrong).collect();
        assert!(wrong.is_empty(), "{wrong:?}");
    };
    tokio::select! {
        () = Shelf::serve(&shelf, &mut stage.line) => {}
        () = clicking => {}
    }
    let shelf = shelf.into_inner().unwrap();
    let id = |target: &str| shelf.kept.iter().find(|(one, ..)| one.target == target).unwrap().0.id.clone();
    assert_eq!(shelf.done[..2], [format!("retry {}", id("/dead")), format!("cancel {}", id("/waits"))]);
    assert_eq!(shelf.done[2..], ["pause", "resume", "retry_dead"]);
    browser.close().await;
}

/// Notes when the row of a new request has been painted, by its number.
const STOPWATCH: &str = "{
    window.painted = [];
    new MutationObserver((changes) => {
        for (const row of changes.flatMap((change) => [...change.addedNodes])) {
            if (!row.classList?.contains('fresh')) continue;
            const id = Number(row.dataset.id);
            requestAnimationFrame(() => setTimeout(() => {
                painted.push([id, performance.timeOrigin + performance.now()]);
                document.documentElement.dataset.painted = id;
            }));
        }
    }).observe(document.querySelector('#space'), {childList: true});
}";

/// How long it takes from a request's arrival at the agent until its row is seen, with 500 rows and more.
#[tokio::test]
#[ignore = "a measurement: cargo test -p agentd --test agent measure -- --ignored --nocapture"]
async fn measure_how_soon_a_request_is_seen() {
    let Some(mut browser) = Chromium::start().await else { return };
    let mut stage = Inspected::start(&[]).await;
    for number in 0..500 {
        stage.pass(posted(&format!("/{number}"), b"{}"), JSON).await;
    }
    browser.open(&format!("http://{}/", stage.address)).await;
    browser.wait_for("document.querySelector('#count')?.textContent === '500'").await;
    browser.evaluate(STOPWATCH).await;
    for number in 501..=600 {
        stage.pass(posted(&format!("/{number}"), b"{}"), JSON).await;
        browser.wait_for(&format!("painted.some(([id]) => id === {number})")).await;
    }
    let painted = browser.evaluate("painted").await;
    let list = stage.get("/api/requests?limit=100").await;
    let arrived = |id: &serde_json::Value| {
        let row = list["requests"].as_array().unwrap().iter().find(|row| row["id"] == *id);
        row.unwrap()["received_at"].as_f64().unwrap() / 1000.0
    };
    let mut took: Vec<f64> = painted
        .as_array()
        .unwrap()
        .iter()
        .map(|seen| seen[1].as_f64().unwrap() - arrived(&seen[0]))
        .collect();
    took.sort_by(f64::total_cmp);
    let at = |part: f64| took[(took.len() as f64 * part) as usize];
    println!(
        "{} requests: p50 {:.0} ms, p95 {:.0} ms, worst {:.0} ms",
        took.len(),
        at(0.5),
        at(0.95),
        at(0.999)
    );
    browser.close().await;
}
