//! The files of a folder, as nginx serves them: ranges, conditions, an index page.
//!
//! Enters: a path and the fields of a request. Leaves: a head and a body. A path is opened beneath the folder by the
//! system itself, so that neither `..` nor a link leads out of it; names that begin with a dot are not served, but
//! for `/.well-known`.

use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use http::{HeaderValue, Method, StatusCode, header};
use proto::{
    error::ErrorCode,
    header::{Headers, value_to_text},
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::serve::policy::{answer::Answer, body::LocalBody};

/// What a folder shows.
const INDEX: &str = "index.html";

/// More ranges than this in one request are none: nobody needs them, and each costs a head of its own.
const MOST_RANGES: usize = 64;

/// What is known of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct About {
    bytes: u64,
    modified: SystemTime,
    content_type: HeaderValue,
}

/// Answers a request for `path`, which may be escaped. The public client asked for it as `asked`, which a folder's address
/// is made of; `query` with its `?`.
pub(crate) async fn serve(
    folder: &Path,
    method: &Method,
    path: &str,
    asked: &str,
    query: &str,
    fields: &Headers,
    now: SystemTime,
) -> Answer {
    if !matches!(*method, Method::GET | Method::HEAD) {
        let allow = HeaderValue::from_static("GET, HEAD");
        return Answer::refusal(ErrorCode::MethodRefused).with(header::ALLOW, Some(allow));
    }
    let Some(name) = relative(path) else { return Answer::refusal(ErrorCode::NoSuchFile) };
    let (folder, wants_folder) = (folder.to_owned(), asked.ends_with('/'));
    let found = tokio::task::spawn_blocking(move || find(&folder, &name, wants_folder)).await;
    match found {
        Ok(Ok(Found::File(file, about))) => {
            let mut boundary = [0; 10];
            // Only who reads the answer is concerned if there is no chance in it.
            let _ = getrandom::fill(&mut boundary);
            let boundary: String = boundary.iter().map(|b| format!("{b:02x}")).collect();
            let plan = plan(&about, fields, now, &boundary);
            let mut body = LocalBody::default();
            if *method == Method::GET {
                let file = Arc::new(file);
                for piece in plan.pieces {
                    match piece {
                        Piece::Text(text) => body.push(text.into()),
                        Piece::Range(range) => body.push_file(Arc::clone(&file), range),
                    }
                }
            }
            Answer::whole(plan.status, plan.headers, body)
        }
        Ok(Ok(Found::Folder)) => match HeaderValue::try_from(format!("{asked}/{query}")) {
            Ok(location) => {
                Answer::empty(StatusCode::MOVED_PERMANENTLY).with(header::LOCATION, Some(location))
            }
            Err(_) => Answer::refusal(ErrorCode::NoSuchFile),
        },
        Ok(Err(error)) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::debug!("a file was not served: {error}");
            }
            Answer::refusal(ErrorCode::NoSuchFile)
        }
        Err(_) => Answer::refusal(ErrorCode::NoSuchFile),
    }
}

/// A path as a name beneath the folder; `None` for what is never served.
fn relative(path: &str) -> Option<PathBuf> {
    let mut segments = path.strip_prefix('/')?.split('/').peekable();
    let mut name = PathBuf::from(".");
    let mut is_first = true;
    while let Some(segment) = segments.next() {
        let decoded = percent_encoding::percent_decode_str(segment).decode_utf8().ok()?;
        if decoded.is_empty() {
            // Only at the end, where it means the folder.
            return segments.peek().is_none().then_some(name);
        }
        let is_plain = !decoded.contains(['/', '\\']) && !decoded.chars().any(char::is_control);
        if !is_plain || (decoded.starts_with('.') && !(is_first && decoded == ".well-known")) {
            return None;
        }
        name.push(&*decoded);
        is_first = false;
    }
    Some(name)
}

enum Found {
    File(File, About),
    /// One that was asked for without the slash behind it.
    Folder,
}

fn find(folder: &Path, name: &Path, wants_folder: bool) -> io::Result<Found> {
    let root = openat(CWD, folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let open = |name: &Path| -> io::Result<File> {
        // Not to wait where somebody has put a pipe.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        Ok(File::from(openat2(&root, name, flags, Mode::empty(), beneath)?))
    };
    let not_found = || io::Error::from(io::ErrorKind::NotFound);
    let (file, name) = {
        let file = open(name)?;
        if file.metadata()?.is_dir() {
            if !wants_folder {
                return Ok(Found::Folder);
            }
            let index = name.join(INDEX);
            (open(&index)?, index)
        } else if wants_folder {
            return Err(not_found());
        } else {
            (file, name.to_owned())
        }
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(not_found());
    }
    let about = About {
        bytes: metadata.len(),
        modified: metadata.modified().unwrap_or(UNIX_EPOCH),
        content_type: content_type(&name),
    };
    Ok(Found::File(file, about))
}

fn content_type(name: &Path) -> HeaderValue {
    let kind = mime_guess::from_path(name).first_raw().unwrap_or("application/octet-stream");
    let is_text = kind.starts_with("text/") || matches!(kind, "application/javascript" | "application/json");
    if is_text && !kind.contains("charset") {
        HeaderValue::try_from(format!("{kind}; charset=utf-8"))
            .unwrap_or(HeaderValue::from_static("application/octet-stream"))
    } else {
        HeaderValue::from_static(kind)
    }
}

/// What is answered about a file.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    status: StatusCode,
    headers: Headers,
    pieces: Vec<Piece>,
}

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Range(Range<u64>),
}

fn plan(about: &About, fields: &Headers, now: SystemTime, boundary: &str) -> Plan {
    // A condition that is not ASCII is one that does not hold, and not none.
    let text = |name| fields.get(name).map(value_to_text);
    let nanos = about.modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let etag = format!("\"{nanos:x}-{:x}\"", about.bytes);
    let modified = httpdate::fmt_http_date(about.modified);
    let mut headers = Headers::new();
    let mut field = |name, value: &str| {
        headers.push(name, HeaderValue::from_str(value).expect("dates and digits are a field's value"));
    };
    field(header::LAST_MODIFIED, &modified);
    field(header::ETAG, &etag);

    let date = |name| text(name).and_then(|text| httpdate::parse_http_date(&text).ok());
    // Dates have whole seconds.
    let changed_at = httpdate::parse_http_date(&modified).unwrap_or(about.modified);
    let is_listed = |list: &str, weak: bool| {
        list.trim_ascii() == "*"
            || list
                .split(',')
                .map(str::trim_ascii)
                .any(|tag| tag == etag || (weak && tag.strip_prefix("W/").is_some_and(|tag| tag == etag)))
    };
    let failed = match text(header::IF_MATCH) {
        Some(list) => !is_listed(&list, false),
        None => date(header::IF_UNMODIFIED_SINCE).is_some_and(|since| changed_at > since),
    };
    let unchanged = match text(header::IF_NONE_MATCH) {
        Some(list) => is_listed(&list, true),
        // A date to come says nothing (RFC 9110 §13.1.3).
        None => date(header::IF_MODIFIED_SINCE).is_some_and(|since| changed_at <= since && since <= now),
    };
    if failed {
        headers.push(header::CONTENT_LENGTH, 0.into());
        return Plan { status: StatusCode::PRECONDITION_FAILED, headers, pieces: Vec::new() };
    }
    if unchanged {
        return Plan { status: StatusCode::NOT_MODIFIED, headers, pieces: Vec::new() };
    }

    headers.push(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let is_same = match text(header::IF_RANGE) {
        None => true,
        Some(tag) if tag.ends_with('"') => tag == etag,
        Some(date) => httpdate::parse_http_date(&date).is_ok_and(|date| date == changed_at),
    };
    let asked =
        text(header::RANGE).filter(|_| is_same).map_or(Ranges::All, |asked| ranges(&asked, about.bytes));
    let mut with = |name, value: String| {
        headers.push(name, HeaderValue::try_from(value).expect("types and digits are a field's value"));
    };
    match asked {
        Ranges::None => {
            with(header::CONTENT_RANGE, format!("bytes */{}", about.bytes));
            with(header::CONTENT_LENGTH, "0".to_owned());
            Plan { status: StatusCode::RANGE_NOT_SATISFIABLE, headers, pieces: Vec::new() }
        }
        Ranges::All => {
            with(header::CONTENT_LENGTH, about.bytes.to_string());
            headers.push(header::CONTENT_TYPE, about.content_type.clone());
            Plan { status: StatusCode::OK, headers, pieces: vec![Piece::Range(0..about.bytes)] }
        }
        Ranges::These(ranges) => {
            let of = |range: &Range<u64>| format!("bytes {}-{}/{}", range.start, range.end - 1, about.bytes);
            if let [range] = &ranges[..] {
                with(header::CONTENT_RANGE, of(range));
                with(header::CONTENT_LENGTH, (range.end - range.start).to_string());
                headers.push(header::CONTENT_TYPE, about.content_type.clone());
                let pieces = vec![Piece::Range(range.clone())];
                return Plan { status: StatusCode::PARTIAL_CONTENT, headers, pieces };
            }
            let kind = about.content_type.to_str().unwrap_or("application/octet-stream");
            let mut pieces = Vec::with_capacity(2 * ranges.len() + 1);
            for range in ranges {
                pieces.push(Piece::Text(format!(
                    "\r\n--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: {}\r\n\r\n",
                    of(&range)
                )));
                pieces.push(Piece::Range(range));
            }
            pieces.push(Piece::Text(format!("\r\n--{boundary}--\r\n")));
            let length: u64 = pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Text(text) => text.len() as u64,
                    Piece::Range(range) => range.end - range.start,
                })
                .sum();
            with(header::CONTENT_LENGTH, length.to_string());
            with(header::CONTENT_TYPE, format!("multipart/byteranges; boundary={boundary}"));
            Plan { status: StatusCode::PARTIAL_CONTENT, headers, pieces }
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Ranges {
    /// `Range` is ignored.
    All,
    /// None of them is there.
    None,
    These(Vec<Range<u64>>),
}

/// Reads `Range` as nginx does: another unit is ignored, what is not understood is not satisfiable, ranges that have
/// more bytes together than the file are ignored.
fn ranges(asked: &str, bytes: u64) -> Ranges {
    let is_bytes = asked.get(..6).is_some_and(|unit| unit.eq_ignore_ascii_case("bytes="));
    if !is_bytes || asked.len() == 6 {
        return Ranges::All;
    }
    let number = |text: &str| -> Option<u64> {
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        text.parse::<i64>().ok().filter(|_| is_number).and_then(|number| number.try_into().ok())
    };
    let mut found = Vec::new();
    let mut size: u64 = 0;
    for part in asked[6..].split(',') {
        let Some((first, last)) = part.split_once('-') else { return Ranges::None };
        let (first, last) = (first.trim_matches(' '), last.trim_matches(' '));
        let range = match (first, last) {
            ("", last) => match number(last) {
                Some(0) => bytes..bytes,
                Some(last) => bytes.saturating_sub(last)..bytes,
                None => return Ranges::None,
            },
            (first, "") => match number(first) {
                Some(first) => first..bytes,
                None => return Ranges::None,
            },
            (first, last) => match (number(first), number(last)) {
                (Some(first), Some(last)) => first..last.saturating_add(1).min(bytes),
                _ => return Ranges::None,
            },
        };
        if range.start < range.end {
            size = size.saturating_add(range.end - range.start);
            found.push(range);
            if found.len() > MOST_RANGES {
                return Ranges::All;
            }
        } else if range.start == 0 {
            return Ranges::All;
        }
    }
    match found.len() {
        0 => Ranges::None,
        _ if size > bytes => Ranges::All,
        _ => Ranges::These(found),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use http::HeaderName;

    use super::*;

    /// What nginx 1.22.1 answered to `Range` for a file of 100 bytes (run by hand): status, `Content-Range`,
    /// `Content-Length`.
    const NGINX: &[(&str, u16, &str, u64)] = &[
        ("bytes=0-0", 206, "bytes 0-0/100", 1),
        ("bytes=0-4", 206, "bytes 0-4/100", 5),
        ("bytes=5-", 206, "bytes 5-99/100", 95),
        ("bytes=-5", 206, "bytes 95-99/100", 5),
        ("bytes=-100", 206, "bytes 0-99/100", 100),
        ("bytes=-500", 206, "bytes 0-99/100", 100),
        ("bytes=-0", 416, "bytes */100", 0),
        ("bytes=0-", 206, "bytes 0-99/100", 100),
        ("bytes=99-", 206, "bytes 99-99/100", 1),
        ("bytes=99-99", 206, "bytes 99-99/100", 1),
        ("bytes=99-500", 206, "bytes 99-99/100", 1),
        ("bytes=100-", 416, "bytes */100", 0),
        ("bytes=100-200", 416, "bytes */100", 0),
        ("bytes=50-40", 416, "bytes */100", 0),
        ("bytes=0--1", 416, "bytes */100", 0),
        ("bytes=", 200, "", 100),
        ("bytes=-", 416, "bytes */100", 0),
        ("bytes=a-b", 416, "bytes */100", 0),
        ("bytes=0-4x", 416, "bytes */100", 0),
        ("bytes= 0-4", 206, "bytes 0-4/100", 5),
        ("bytes=0 - 4", 206, "bytes 0-4/100", 5),
        ("bytes=0-4 ,", 416, "bytes */100", 0),
        ("bytes=0-4,", 416, "bytes */100", 0),
        ("bytes=,0-4", 416, "bytes */100", 0),
        ("BYTES=0-4", 206, "bytes 0-4/100", 5),
        ("Bytes=1-1", 206, "bytes 1-1/100", 1),
        ("items=0-4", 200, "", 100),
        ("bytes 0-4", 200, "", 100),
        ("bytes=0-0,-1", 206, "", 200),
        ("bytes=0-4,10-14", 206, "", 208),
        ("bytes=0-4,3-8", 206, "", 207),
        ("bytes=200-,0-1", 206, "bytes 0-1/100", 2),
        ("bytes=0-1,200-", 206, "bytes 0-1/100", 2),
        ("bytes=200-,300-", 416, "bytes */100", 0),
        ("bytes=0-99,0-0", 200, "", 100),
        ("bytes=0-98,0-0", 206, "", 297),
        ("bytes=0-60,0-60", 200, "", 100),
        ("bytes=5-4,0-1", 206, "bytes 0-1/100", 2),
        ("bytes=0-1,5-4", 206, "bytes 0-1/100", 2),
        ("bytes=18446744073709551616-", 416, "bytes */100", 0),
        ("bytes=0-18446744073709551616", 416, "bytes */100", 0),
        ("bytes=0-9223372036854775807", 206, "bytes 0-99/100", 100),
        ("bytes=9223372036854775806-9223372036854775807", 416, "bytes */100", 0),
        ("bytes=-9223372036854775807", 206, "bytes 0-99/100", 100),
        ("bytes=00-04", 206, "bytes 0-4/100", 5),
        ("bytes=+0-4", 416, "bytes */100", 0),
        ("bytes=0-4;", 416, "bytes */100", 0),
        ("bytes=0-0,1-1,2-2", 206, "", 283),
        ("bytes=0.5-1", 416, "bytes */100", 0),
        ("bytes=0x1-2", 416, "bytes */100", 0),
    ];

    const MODIFIED: &str = "Fri, 02 Jan 2026 03:04:05 GMT";

    fn about() -> About {
        About {
            bytes: 100,
            modified: httpdate::parse_http_date(MODIFIED).unwrap(),
            content_type: HeaderValue::from_static("text/plain"),
        }
    }

    fn planned(fields: &[(&'static str, &str)]) -> Plan {
        let field = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        let now = httpdate::parse_http_date("Sun, 01 Mar 2026 00:00:00 GMT").unwrap();
        // As long as nginx's boundary.
        plan(&about(), &fields.iter().map(field).collect(), now, "00000000000000000006")
    }

    fn text(plan: &Plan, name: HeaderName) -> String {
        plan.headers.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
    }

    #[test]
    fn ranges_are_answered_as_nginx_does() {
        for &(asked, status, range, length) in NGINX {
            let plan = planned(&[("range", asked)]);
            let seen = (
                plan.status.as_u16(),
                text(&plan, header::CONTENT_RANGE),
                text(&plan, header::CONTENT_LENGTH),
            );
            assert_eq!(seen, (status, range.to_owned(), length.to_string()), "{asked}");
            let bytes: u64 = plan
                .pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Text(text) => text.len() as u64,
                    Piece::Range(range) => range.end - range.start,
                })
                .sum();
            assert_eq!(bytes, length, "{asked}");
        }
        let plan = planned(&[("range", "bytes=0-0,-1")]);
        let first =
            "\r\n--00000000000000000006\r\nContent-Type: text/plain\r\nContent-Range: bytes 0-0/100\r\n\r\n";
        assert_eq!(plan.pieces[..2], [Piece::Text(first.to_owned()), Piece::Range(0..1)]);
        assert_eq!(plan.pieces[4], Piece::Text("\r\n--00000000000000000006--\r\n".to_owned()));
    }

    #[test]
    fn conditions_are_those_of_rfc_9110_and_nginx() {
        let etag = text(&planned(&[]), header::ETAG);
        let weak = format!("W/{etag}");
        let list = format!("\"x\", {etag}");
        let accented = format!("\"é\", {etag}");
        let range = ("range", "bytes=0-4");
        for (fields, status) in [
            (&[range, ("if-range", &*etag)][..], 206),
            (&[range, ("if-range", MODIFIED)], 206),
            (&[range, ("if-range", "\"x\"")], 200),
            (&[range, ("if-range", &weak)], 200),
            (&[range, ("if-range", "Sat, 03 Jan 2026 03:04:05 GMT")], 200),
            (&[range, ("if-range", "junk")], 200),
            (&[range, ("if-range", "\"é\"")], 200),
            (&[("if-none-match", &*etag)], 304),
            (&[("if-none-match", "*")], 304),
            (&[("if-none-match", &weak)], 304),
            (&[("if-none-match", &list)], 304),
            (&[("if-none-match", &accented)], 304),
            (&[("if-none-match", "\"x\"")], 200),
            (&[("if-none-match", "\"x\""), ("if-modified-since", MODIFIED)], 200),
            (&[("if-none-match", &etag), range], 304),
            (&[("if-match", "\"x\"")], 412),
            (&[("if-match", &weak)], 412),
            (&[("if-match", "\"é\"")], 412),
            (&[("if-match", &etag)], 200),
            (&[("if-match", "*")], 200),
            (&[("if-unmodified-since", "Thu, 01 Jan 2026 00:00:00 GMT")], 412),
            (&[("if-unmodified-since", MODIFIED)], 200),
            (&[("if-modified-since", MODIFIED)], 304),
            (&[("if-modified-since", "Thu, 01 Jan 2026 00:00:00 GMT")], 200),
            (&[("if-modified-since", "Fri, 01 Jan 2027 00:00:00 GMT")], 200),
            (&[("if-modified-since", "junk")], 200),
        ] {
            assert_eq!(planned(fields).status.as_u16(), status, "{fields:?}");
        }
    }

    async fn got(folder: &Path, path: &str) -> (u16, String, Option<ErrorCode>) {
        let answer = serve(folder, &Method::GET, path, path, "?q", &Headers::new(), SystemTime::now()).await;
        let code = answer.code;
        let id = proto::id::RequestId::from_random([1; 16]);
        let (status, headers, mut body) = answer.into_parts(&id, false);
        let mut bytes = Vec::new();
        while let Some(next) = body.next().await {
            bytes.extend_from_slice(&next.unwrap());
        }
        let location = headers.get("location").map(|value| value.to_str().unwrap().to_owned());
        (status, location.unwrap_or_else(|| String::from_utf8(bytes).unwrap()), code)
    }

    #[tokio::test]
    async fn a_folder_shows_its_files_and_nothing_else() {
        let outside = tempfile::tempdir().unwrap();
        let folder = outside.path().join("www");
        fs::create_dir_all(folder.join("sub/deep")).unwrap();
        fs::create_dir_all(folder.join(".git")).unwrap();
        fs::create_dir_all(folder.join(".well-known")).unwrap();
        for (name, text) in [
            ("secret", "secret"),
            ("www/.env", "secret"),
            ("www/.git/config", "secret"),
            ("www/sub/.htpasswd", "secret"),
            ("www/sub/.well-known", "secret"),
            ("www/index.html", "home"),
            ("www/a b.txt", "blank"),
            ("www/sub/index.html", "sub"),
            ("www/sub/x", "x"),
            ("www/.well-known/acme", "acme"),
        ] {
            fs::write(outside.path().join(name), text).unwrap();
        }
        symlink("../secret", folder.join("out")).unwrap();
        symlink(outside.path().join("secret"), folder.join("absolute")).unwrap();
        symlink("..", folder.join("up")).unwrap();
        symlink("/", folder.join("base")).unwrap();
        symlink("/proc/self", folder.join("self")).unwrap();
        symlink("sub/x", folder.join("inside")).unwrap();
        symlink("loop", folder.join("loop")).unwrap();

        for (path, status, text) in [
            ("/", 200, "home"),
            ("/index.html", 200, "home"),
            ("/a%20b.txt", 200, "blank"),
            ("/sub/", 200, "sub"),
            ("/sub/x", 200, "x"),
            ("/%73ub/x", 200, "x"),
            ("/inside", 200, "x"),
            ("/.well-known/acme", 200, "acme"),
            ("/sub", 301, "/sub/?q"),
        ] {
            assert_eq!(got(&folder, path).await, (status, text.to_owned(), None), "{path}");
        }
        let tries = [
            "/../secret",
            "/..",
            "/../",
            "/./../secret",
            "/sub/../../secret",
            "/sub/../x",
            "/sub/./x",
            "/sub/..",
            "/%2e%2e/secret",
            "/%2E%2E/secret",
            "/.%2e/secret",
            "/%2e./secret",
            "/%2e%2e%2fsecret",
            "/..%2fsecret",
            "/..%2Fsecret",
            "/sub/..%2f..%2fsecret",
            "/sub%2f..%2f..%2fsecret",
            "/sub%2fx",
            "/%252e%252e/secret",
            "/%252e%252e%252fsecret",
            "/..%252fsecret",
            "/..%5csecret",
            "/..\\secret",
            "/%5c..%5csecret",
            "/..%c0%afsecret",
            "/%c0%ae%c0%ae/secret",
            "/%e0%80%ae%e0%80%ae/secret",
            "/..%00/secret",
            "/index.html%00",
            "/sub/x%00.txt",
            "/%00",
            "/%0a",
            "/x%0d%0ay",
            "//secret",
            "//etc/passwd",
            "///etc/passwd",
            "/sub//x",
            "/sub///x",
            "//sub/x",
            "/%2fetc/passwd",
            "/%2Fetc%2Fpasswd",
            "/etc/passwd",
            "/proc/self/environ",
            "/.env",
            "/%2eenv",
            "/.git/config",
            "/%2egit/config",
            "/.git/",
            "/sub/.htpasswd",
            "/sub/.well-known",
            "/.well-known/../.env",
            "/out",
            "/out/",
            "/absolute",
            "/up/secret",
            "/up/www/index.html",
            "/base/etc/passwd",
            "/base/",
            "/self/environ",
            "/self/cwd/secret",
            "/loop",
            "/index.html/",
            "/index.html/x",
            "/nothing",
            "/sub/deep/",
            "/~root",
            "/..;/secret",
            "/sub/..;/..;/secret",
            "",
            "*",
            "/%",
        ];
        assert!(tries.len() >= 60, "{}", tries.len());
        for path in tries {
            let (status, text, code) = got(&folder, path).await;
            assert_eq!((status, code), (404, Some(ErrorCode::NoSuchFile)), "{path}: {text}");
            assert!(!text.contains("secret\n") && !text.contains("/bin/"), "{path}");
        }
        let answer = serve(&folder, &Method::POST, "/", "/", "", &Headers::new(), SystemTime::now()).await;
        assert_eq!(answer.code, Some(ErrorCode::MethodRefused));
        assert!(answer.fields.iter().any(|(name, value)| name == header::ALLOW && value == "GET, HEAD"));
    }
}
