//! `curl` command lines: one that sends the bytes of a request again, and reading somebody's.
//!
//! What passed is an attacker's: every word is quoted for a POSIX shell, and no byte that a terminal would take for a
//! command is in the text.

use std::{fmt::Write as _, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD};

use super::replay::Request;
use crate::{
    config::{Http2, TunnelConfig},
    report::terminal::is_obeyed,
};

/// A longer argument is not taken by Linux (128 KiB, with room for the rest).
const ARGUMENT_BYTES: usize = 96 * 1024;

/// Why a command line is not taken.
type Refusal = String;

/// How a server is reached.
#[derive(Debug, Clone)]
pub(crate) struct Reach<'a> {
    /// `http://host:port`, `https://…` or `unix:/path`.
    base: &'a str,
    http2: Http2,
    /// Whether any certificate will do.
    insecure: bool,
    /// Certificates that are trusted.
    ca_file: Option<&'a Path>,
    /// Whose certificate it has, where that is not the host's.
    server_name: Option<String>,
}

impl<'a> Reach<'a> {
    /// As anybody would, over HTTP/1.1.
    pub(crate) const fn to(base: &'a str) -> Self {
        Self { base, http2: Http2::Never, insecure: false, ca_file: None, server_name: None }
    }

    /// As a tunnel reaches its upstreams.
    pub(crate) fn as_of(config: &'a TunnelConfig, base: &'a str) -> Self {
        Self {
            base,
            http2: config.http2,
            insecure: config.insecure_skip_verify,
            ca_file: config.ca_file.as_deref(),
            server_name: config.server_name.as_ref().map(|name| name.to_str().into_owned()),
        }
    }

    /// Writes what curl is to be told; the address that the target follows.
    fn write(&self, line: &mut String) -> String {
        if let Some(path) = self.base.strip_prefix("unix:") {
            let _ = write!(line, " --unix-socket {}", quoted(path.as_bytes()));
            return "http://localhost".to_owned();
        }
        let base = self.base.trim_end_matches('/');
        let Some(authority) = base.strip_prefix("https://") else { return base.to_owned() };
        match self.ca_file {
            _ if self.insecure => line.push_str(" --insecure"),
            Some(path) => {
                let _ = write!(line, " --cacert {}", quoted(path.as_os_str().as_encoded_bytes()));
            }
            None => {}
        }
        let Some(name) = &self.server_name else { return base.to_owned() };
        // An address of IPv6 has colons of its own.
        let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.contains(']'));
        let colon = if port.is_some() { "" } else { ":" };
        let _ = write!(line, " --connect-to {}", quoted(format!("::{authority}{colon}").as_bytes()));
        let name = if name.contains(':') { format!("[{name}]") } else { name.clone() };
        port.map_or_else(|| format!("https://{name}"), |port| format!("https://{name}:{port}"))
    }

    /// Which HTTP curl is to speak.
    fn version(&self) -> &'static str {
        match self.http2 {
            Http2::Always => "--http2-prior-knowledge",
            Http2::Auto if self.base.starts_with("https://") => "--http2",
            Http2::Auto | Http2::Never => "--http1.1",
        }
    }
}

/// A command line that sends `request`. One with the method HEAD has no body: curl would not send it.
///
/// curl writes the name of `Host` in its own way; everything else is the same bytes.
pub(crate) fn command(request: &Request, reach: &Reach<'_>) -> String {
    let mut line = String::new();
    let is_argument = request.body.len() <= ARGUMENT_BYTES && is_harmless(&request.body);
    if !request.body.is_empty() && !is_argument {
        let _ = write!(line, "printf %s {} | base64 -d | ", BASE64_STANDARD.encode(&request.body));
    }
    let _ = write!(line, "curl {} --globoff --path-as-is", reach.version());
    let has = |name: &str| request.fields.iter().any(|(own, _)| own.eq_ignore_ascii_case(name));
    if request.method.eq_ignore_ascii_case("HEAD") {
        line.push_str(" --head");
    } else if request.method != "GET" || !request.body.is_empty() {
        let _ = write!(line, " --request {}", quoted(request.method.as_bytes()));
    }
    let base = reach.write(&mut line);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:@?".contains(&byte);
    if request.target.starts_with('/') && request.target.bytes().all(plain) {
        let _ = write!(line, " {}", quoted(format!("{base}{}", request.target).as_bytes()));
    } else {
        let target = quoted(request.target.as_bytes());
        let _ = write!(line, " --request-target {target} {}", quoted(format!("{base}/").as_bytes()));
    }
    for (name, value) in &request.fields {
        let field = match value.as_slice() {
            b"" => format!("{name};").into_bytes(),
            value => [name.as_bytes(), b": ", value].concat(),
        };
        let _ = write!(line, " \\\n  --header {}", quoted(&field));
    }
    // What curl adds by itself is taken off.
    let added = ["user-agent", "accept"].into_iter();
    let added = added.chain((!request.body.is_empty()).then_some("content-type"));
    for name in added.chain((request.body.len() >= 1 << 20).then_some("expect")).filter(|name| !has(name)) {
        let _ = write!(line, " \\\n  --header '{name}:'");
    }
    match (request.body.is_empty(), is_argument) {
        (true, _) => {}
        (false, true) => {
            let _ = write!(line, " \\\n  --data-raw {}", quoted(&request.body));
        }
        (false, false) => line.push_str(" \\\n  --data-binary @-"),
    }
    line.push('\n');
    line
}

/// Whether bytes can be pasted, and are what they look like: UTF-8 without anything that a terminal obeys.
fn is_harmless(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes)
        .is_ok_and(|text| text.chars().all(|c| matches!(c, '\n' | '\t') || !is_obeyed(c)))
}

/// One word of a shell.
fn quoted(word: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-._~%+,:@=".contains(byte);
    match std::str::from_utf8(word) {
        Ok(text) if !word.is_empty() && word.iter().all(plain) => text.to_owned(),
        Ok(text) if is_harmless(word) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => {
            let mut escaped = String::new();
            for &byte in word {
                match byte {
                    b'%' => escaped.push_str("%%"),
                    b'\\' => escaped.push_str(r"\\"),
                    b'\'' => escaped.push_str(r"\047"),
                    b' '..=b'~' => escaped.push(byte as char),
                    _ => {
                        let _ = write!(escaped, "\\{byte:03o}");
                    }
                }
            }
            format!("\"$(printf '{escaped}')\"")
        }
    }
}

/// Reads a command line.
///
/// # Errors
///
/// A sentence for the user: also for what reads files or is not known.
pub(crate) fn parse(line: &str) -> Result<Request, Refusal> {
    let mut words = words(line)?.into_iter();
    if words.next().as_deref() != Some("curl") {
        return Err("this is not a curl command line: it begins with another word".to_owned());
    }
    let mut read = Read::default();
    while let Some(word) = words.next() {
        if let Some(long) = word.strip_prefix("--") {
            let (name, value) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let option =
                Switch::named(name).ok_or_else(|| format!("--{name} of curl is not understood here"))?;
            let value = match (option.takes_value(), value) {
                (true, None) => Some(words.next().ok_or_else(|| format!("--{name} wants a value"))?),
                (_, value) => value,
            };
            read.take(option, value.unwrap_or_default())?;
        } else if let Some(mut short) = word.strip_prefix('-').filter(|short| !short.is_empty()) {
            while let Some(letter) = short.chars().next() {
                short = &short[letter.len_utf8()..];
                let option = Switch::short(letter)
                    .ok_or_else(|| format!("-{letter} of curl is not understood here"))?;
                let mut value = String::new();
                if option.takes_value() {
                    value = if short.is_empty() {
                        words.next().ok_or_else(|| format!("-{letter} wants a value"))?
                    } else {
                        std::mem::take(&mut short).to_owned()
                    };
                }
                read.take(option, value)?;
            }
        } else {
            read.take(Switch::Url, word)?;
        }
    }
    read.finish()
}

/// What an option does to a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Switch {
    Url,
    Method,
    Field,
    Data,
    DataRaw,
    Json,
    User,
    UserAgent,
    Referer,
    Cookie,
    Head,
    Get,
    RequestTarget,
    /// Nothing, and it has a value.
    Other,
    /// Nothing.
    Nothing,
    Form,
}

impl Switch {
    const fn takes_value(self) -> bool {
        !matches!(self, Self::Head | Self::Get | Self::Nothing)
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "url" => Self::Url,
            "request" => Self::Method,
            "header" => Self::Field,
            "data" | "data-ascii" | "data-binary" => Self::Data,
            "data-raw" => Self::DataRaw,
            "json" => Self::Json,
            "user" => Self::User,
            "user-agent" => Self::UserAgent,
            "referer" => Self::Referer,
            "cookie" => Self::Cookie,
            "head" => Self::Head,
            "get" => Self::Get,
            "request-target" => Self::RequestTarget,
            "form" | "data-urlencode" | "form-string" | "upload-file" => Self::Form,
            "output" | "max-time" | "connect-timeout" | "unix-socket" | "resolve" | "connect-to"
            | "cacert" | "cert" | "key" | "write-out" | "retry" | "proxy" | "cookie-jar" | "dump-header"
            | "max-redirs" => Self::Other,
            "compressed"
            | "silent"
            | "show-error"
            | "insecure"
            | "location"
            | "verbose"
            | "include"
            | "globoff"
            | "path-as-is"
            | "http1.0"
            | "http1.1"
            | "http2"
            | "http2-prior-knowledge"
            | "http3"
            | "fail"
            | "fail-with-body"
            | "no-buffer"
            | "ipv4"
            | "ipv6"
            | "raw"
            | "no-progress-meter" => Self::Nothing,
            _ => return None,
        })
    }

    const fn short(letter: char) -> Option<Self> {
        Some(match letter {
            'X' => Self::Method,
            'H' => Self::Field,
            'd' => Self::Data,
            'u' => Self::User,
            'A' => Self::UserAgent,
            'e' => Self::Referer,
            'b' => Self::Cookie,
            'I' => Self::Head,
            'G' => Self::Get,
            'F' | 'T' => Self::Form,
            'o' | 'm' | 'w' | 'x' | 'c' | 'D' | 'E' => Self::Other,
            's' | 'S' | 'k' | 'L' | 'v' | 'i' | 'g' | 'f' | 'N' | '4' | '6' | '0' => Self::Nothing,
            _ => return None,
        })
    }
}

#[derive(Default)]
struct Read {
    url: Option<String>,
    method: Option<String>,
    target: Option<String>,
    fields: Vec<(String, Vec<u8>)>,
    /// Fields that curl would add by itself and that are taken off.
    removed: Vec<String>,
    data: Option<Vec<u8>>,
    json: bool,
    head: bool,
    get: bool,
}

impl Read {
    fn take(&mut self, option: Switch, value: String) -> Result<(), Refusal> {
        match option {
            Switch::Url if self.url.is_some() => return Err("there are two addresses in it".to_owned()),
            Switch::Url => self.url = Some(value),
            Switch::Method => self.method = Some(value),
            Switch::Field => match value.split_once(':') {
                Some((name, "")) => self.removed.push(name.trim().to_ascii_lowercase()),
                Some((name, value)) => self.field(name.trim(), value.trim()),
                None => match value.strip_suffix(';') {
                    Some(name) => self.field(name, ""),
                    None => return Err(format!("{value:?} is not a header field")),
                },
            },
            Switch::Data | Switch::Json if value.starts_with('@') => {
                return Err(format!("the body is in the file {:?}: put it into the command", &value[1..]));
            }
            Switch::Data | Switch::DataRaw | Switch::Json => {
                self.json |= option == Switch::Json;
                match &mut self.data {
                    Some(data) => {
                        if option != Switch::Json {
                            data.push(b'&');
                        }
                        data.extend(value.into_bytes());
                    }
                    None => self.data = Some(value.into_bytes()),
                }
            }
            Switch::User => {
                let value = format!("Basic {}", BASE64_STANDARD.encode(value));
                self.field("authorization", &value);
            }
            Switch::UserAgent => self.field("user-agent", &value),
            Switch::Referer => self.field("referer", &value),
            Switch::Cookie if value.contains('=') => self.field("cookie", &value),
            Switch::Cookie => {
                return Err(format!("the cookies are in the file {value:?}: put them in as a field"));
            }
            Switch::Head => self.head = true,
            Switch::Get => self.get = true,
            Switch::RequestTarget => self.target = Some(value),
            Switch::Form => {
                return Err("forms and files of curl are not read here: give the body with --data".to_owned());
            }
            Switch::Other | Switch::Nothing => {}
        }
        Ok(())
    }

    fn field(&mut self, name: &str, value: &str) {
        self.fields.push((name.to_owned(), value.as_bytes().to_vec()));
    }

    fn has(&self, name: &str) -> bool {
        self.removed.iter().any(|removed| removed == name)
            || self.fields.iter().any(|(own, _)| own.eq_ignore_ascii_case(name))
    }

    fn finish(mut self) -> Result<Request, Refusal> {
        let url = self.url.take().ok_or("there is no address in it")?;
        let (host, mut target) = split_url(&url);
        if let Some(exact) = self.target.take() {
            target = exact;
        }
        let mut body = self.data.take();
        if self.get
            && let Some(data) = body.take()
        {
            target.push(if target.contains('?') { '&' } else { '?' });
            target.push_str(&String::from_utf8_lossy(&data));
        }
        if !self.has("host") {
            self.fields.insert(0, ("host".to_owned(), host.into_bytes()));
        }
        if let Some(user) = user_of(&url)
            && !self.has("authorization")
        {
            self.field("authorization", &format!("Basic {}", BASE64_STANDARD.encode(user)));
        }
        if !self.has("accept") {
            let accept = if self.json { "application/json" } else { "*/*" };
            self.field("accept", accept);
        }
        if body.is_some() && !self.has("content-type") {
            let kind = if self.json { "application/json" } else { "application/x-www-form-urlencoded" };
            self.field("content-type", kind);
        }
        let usual = if self.head {
            "HEAD"
        } else if body.is_some() {
            "POST"
        } else {
            "GET"
        };
        Ok(Request {
            method: self.method.unwrap_or_else(|| usual.to_owned()),
            target,
            fields: self.fields,
            body: body.unwrap_or_default(),
        })
    }
}

/// Scheme and host of an address, and what follows them.
pub(crate) fn split_origin(url: &str) -> Option<(&str, &str)> {
    let authority = url.find("://")? + 3;
    let end = url[authority..].find('/').map_or(url.len(), |at| authority + at);
    Some(url.split_at(end))
}

/// Host and target of an address; without a scheme it is HTTP.
pub(crate) fn split_url(url: &str) -> (String, String) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.split('#').next().unwrap_or_default();
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, place) = rest.split_at(end);
    let host = authority.rsplit('@').next().unwrap_or_default();
    let target = if place.starts_with('/') { place.to_owned() } else { format!("/{place}") };
    (host.to_owned(), target)
}

/// User name and password of an address that names them, as they go into `authorization`.
fn user_of(url: &str) -> Option<Vec<u8>> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next()?;
    let (user, _) = authority.rsplit_once('@')?;
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    let plain = |text| percent_encoding::percent_decode_str(text);
    Some(plain(name).chain([b':']).chain(plain(password)).collect())
}

/// Whether a shell puts something else where `$` stands before this.
const fn is_expanded(next: Option<&u8>) -> bool {
    matches!(
        next,
        Some(
            b'a'..=b'z'
            | b'A'..=b'Z'
            | b'0'..=b'9'
            | b'_'
            | b'{'
            | b'('
            | b'*'
            | b'@'
            | b'#'
            | b'?'
            | b'$'
            | b'!'
            | b'-',
        )
    )
}

/// The words of a command line, as a shell takes them apart. What it would expand is refused.
fn words(line: &str) -> Result<Vec<String>, Refusal> {
    let unclosed = || "a quote in it is not closed".to_owned();
    let expanded = |byte: u8| {
        format!(
            "{:?} in it stands for what only your shell knows: write that, or quote it with '",
            byte as char
        )
    };
    let mut words = Vec::new();
    let mut word: Option<Vec<u8>> = None;
    let mut rest = line.trim().bytes().peekable();
    while let Some(byte) = rest.next() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => words.extend(word.take()),
            b'\\' => match rest.next() {
                Some(b'\n') => {}
                Some(b'\r') => drop(rest.next_if_eq(&b'\n')),
                Some(byte) => word.get_or_insert_default().push(byte),
                None => return Err(unclosed()),
            },
            b'\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next().ok_or_else(unclosed)? {
                        b'\'' => break,
                        byte => word.push(byte),
                    }
                }
            }
            b'"' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next().ok_or_else(unclosed)? {
                        b'"' => break,
                        b'\\' => match rest.next().ok_or_else(unclosed)? {
                            b'\n' => {}
                            byte @ (b'"' | b'\\' | b'$' | b'`') => word.push(byte),
                            byte => word.extend([b'\\', byte]),
                        },
                        b'`' => return Err(expanded(b'`')),
                        b'$' if is_expanded(rest.peek()) => return Err(expanded(b'$')),
                        byte => word.push(byte),
                    }
                }
            }
            // Browsers write what is not printable in this way.
            b'$' if rest.next_if_eq(&b'\'').is_some() => {
                escaped(&mut rest, word.get_or_insert_default()).ok_or_else(unclosed)?;
            }
            b'$' if is_expanded(rest.peek()) => return Err(expanded(b'$')),
            b'|' | b';' | b'&' | b'<' | b'>' | b'`' | b'(' | b')' => {
                return Err(format!("{:?} outside of quotes: give the curl command alone", byte as char));
            }
            byte => word.get_or_insert_default().push(byte),
        }
    }
    words.extend(word);
    words
        .into_iter()
        .map(|word| String::from_utf8(word).map_err(|_| "a word in it is not UTF-8".to_owned()))
        .collect()
}

/// Reads `$'…'` behind its first quote.
fn escaped(rest: &mut std::iter::Peekable<impl Iterator<Item = u8>>, word: &mut Vec<u8>) -> Option<()> {
    loop {
        match rest.next()? {
            b'\'' => return Some(()),
            b'\\' => match rest.next()? {
                b'n' => word.push(b'\n'),
                b't' => word.push(b'\t'),
                b'r' => word.push(b'\r'),
                b'x' => word.push(number(rest, 16, 2)? as u8),
                b'u' => {
                    let code = number(rest, 16, 4)?;
                    // Half of a pair stands for a character beyond 16 bits.
                    let code = match code {
                        0xd800..0xdc00 if rest.next_if_eq(&b'\\').is_some() => {
                            rest.next_if_eq(&b'u')?;
                            0x1_0000 + ((code - 0xd800) << 10) + number(rest, 16, 4)?.checked_sub(0xdc00)?
                        }
                        code => code,
                    };
                    let mut bytes = [0; 4];
                    word.extend(char::from_u32(code)?.encode_utf8(&mut bytes).as_bytes());
                }
                digit @ b'0'..=b'7' => {
                    let first = u32::from(digit - b'0');
                    let mut value = first;
                    for _ in 0..2 {
                        let Some(digit) = rest.next_if(|byte| (b'0'..=b'7').contains(byte)) else { break };
                        value = value * 8 + u32::from(digit - b'0');
                    }
                    word.push(value as u8);
                }
                byte => word.push(byte),
            },
            byte => word.push(byte),
        }
    }
}

fn number(rest: &mut std::iter::Peekable<impl Iterator<Item = u8>>, radix: u32, most: usize) -> Option<u32> {
    let mut digits = 0;
    let mut value = 0;
    while digits < most
        && let Some(byte) = rest.next_if(|byte| (*byte as char).is_digit(radix))
    {
        value = value * radix + (byte as char).to_digit(radix)?;
        digits += 1;
    }
    (digits > 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, target: &str, fields: &[(&str, &[u8])], body: &[u8]) -> Request {
        Request {
            method: method.to_owned(),
            target: target.to_owned(),
            fields: fields.iter().map(|(name, value)| ((*name).to_owned(), value.to_vec())).collect(),
            body: body.to_vec(),
        }
    }

    #[test]
    fn a_command_names_everything_and_nothing_else() {
        let request = request(
            "POST",
            "/a?b=c&d",
            &[("host", b"localhost:3000"), ("x", b"it's"), ("empty", b""), ("obs", b"%\xff'\\")],
            b"{\"a\": 'b'}\n",
        );
        assert_eq!(
            command(&request, &Reach::to("http://localhost:3000")),
            "curl --http1.1 --globoff --path-as-is --request POST 'http://localhost:3000/a?b=c&d' \\\n  \
             --header 'host: localhost:3000' \\\n  --header 'x: it'\\''s' \\\n  --header 'empty;' \\\n  \
             --header \"$(printf 'obs: %%\\377\\047\\\\')\" \\\n  --header 'user-agent:' \\\n  --header 'accept:' \\\n  \
             --header 'content-type:' \\\n  --data-raw '{\"a\": '\\''b'\\''}\n'\n"
        );
    }

    #[test]
    fn a_command_reaches_its_server_as_the_tunnel_does() {
        let sent = request("GET", "/x", &[("user-agent", b"x"), ("accept", b"y")], b"");
        let to = Reach::to;
        let named = |name: &str| Some(name.to_owned());
        for (reach, begins) in [
            (Reach { http2: Http2::Always, ..to("http://h:1") }, "--http2-prior-knowledge # http://h:1/x"),
            (Reach { http2: Http2::Auto, ..to("http://h:1") }, "--http1.1 # http://h:1/x"),
            (Reach { http2: Http2::Auto, ..to("https://h") }, "--http2 # https://h/x"),
            (Reach { insecure: true, ..to("http://h") }, "--http1.1 # http://h/x"),
            (
                Reach { insecure: true, ca_file: Some(Path::new("/a")), ..to("https://h") },
                "--http1.1 # --insecure https://h/x",
            ),
            (
                Reach { ca_file: Some(Path::new("/a b")), ..to("https://h") },
                "--http1.1 # --cacert '/a b' https://h/x",
            ),
            (
                Reach { server_name: named("n.example"), ..to("https://127.0.0.1:8443") },
                "--http1.1 # --connect-to ::127.0.0.1:8443 https://n.example:8443/x",
            ),
            (
                Reach { server_name: named("::1"), ..to("https://[fd00::1]") },
                "--http1.1 # --connect-to '::[fd00::1]:' 'https://[::1]/x'",
            ),
        ] {
            let begins = format!("curl {} \\\n", begins.replace('#', "--globoff --path-as-is"));
            let line = command(&sent, &reach);
            assert!(line.starts_with(&begins), "{line} {begins}");
            assert_eq!(parse(&line).unwrap().target, "/x");
        }
    }

    #[test]
    fn what_a_terminal_obeys_is_not_in_it() {
        let request =
            request("GET", "/\u{9b}31m$(id)`id`", &[("x", "\u{202e}\u{9b}1m".as_bytes())], b"\x1b]0;x\x07\0");
        let line = command(&request, &Reach::to("unix:/run/a b.sock"));
        assert!(line.chars().all(|c| c == '\n' || !c.is_control()), "{line:?}");
        assert!(line.contains("| base64 -d | curl") && line.ends_with("--data-binary @-\n"), "{line}");
        assert!(
            line.contains("--unix-socket '/run/a b.sock'") && line.contains("--request-target"),
            "{line}"
        );
    }

    #[test]
    fn command_lines_of_browsers_and_documents_are_read() {
        let read = parse(
            "curl 'https://web.example.com/api?x=1#y' -X 'PUT' \\\n  -H 'content-type: application/json' \\\r\n  \
             -H 'empty;' --data-raw $'{\"a\":\"\\u00e4\\'\\n\"}' --compressed -sSL",
        )
        .unwrap();
        let wanted: [(&str, &[u8]); 4] = [
            ("host", b"web.example.com"),
            ("content-type", b"application/json"),
            ("empty", b""),
            ("accept", b"*/*"),
        ];
        assert_eq!(read, request("PUT", "/api?x=1", &wanted, "{\"a\":\"ä'\n\"}".as_bytes()));

        let read = parse(r#"curl -XPOST -d a=1 -d "b=\"2\"" -uuser:pass localhost:3000"#).unwrap();
        let wanted: [(&str, &[u8]); 4] = [
            ("host", b"localhost:3000"),
            ("authorization", b"Basic dXNlcjpwYXNz"),
            ("accept", b"*/*"),
            ("content-type", b"application/x-www-form-urlencoded"),
        ];
        assert_eq!(read, request("POST", "/", &wanted, b"a=1&b=\"2\""));

        let read = parse(r#"curl "http://u%40x:p%3a@h/?price=$&b=\$x" -d '$HOME'"#).unwrap();
        let wanted: [(&str, &[u8]); 4] = [
            ("host", b"h"),
            ("authorization", b"Basic dUB4OnA6"),
            ("accept", b"*/*"),
            ("content-type", b"application/x-www-form-urlencoded"),
        ];
        assert_eq!(read, request("POST", "/?price=$&b=$x", &wanted, b"$HOME"));
        let named = |line: &str| parse(line).unwrap().fields[1].1.clone();
        assert_eq!(named("curl u@h/a@b"), b"Basic dTo=");
        assert_eq!(named("curl h/a@b"), b"*/*");
        assert_eq!(named("curl http://u:p@h -H 'Authorization: own'"), b"own");

        let read = parse("curl -G --data q=1 http://h/p?z --json '{}'").unwrap();
        assert_eq!((&*read.method, &*read.target), ("GET", "/p?z&q=1{}"));
        assert_eq!(parse("curl -I http://h").unwrap().method, "HEAD");
        assert_eq!(parse("curl --request-target '*' -X OPTIONS http://h").unwrap().target, "*");
    }

    #[test]
    fn what_would_do_something_else_is_refused() {
        for line in [
            "",
            "wget x",
            "curl",
            "curl a b",
            "curl 'x",
            "curl -d @/etc/passwd x",
            "curl -F a=b x",
            "curl -b cookies.txt x",
            "curl --frobnicate x",
            "curl -Z x",
            "curl x; rm -rf y",
            "curl x | sh",
            "curl x -H nonsense",
            "curl x -H",
            "curl x \\",
            "curl $'\\u",
            "curl -H \"authorization: Bearer $TOKEN\" x",
            "curl -H \"x: ${TOKEN}\" x",
            "curl -H \"x: $(id)\" x",
            "curl -H \"x: `id`\" x",
            "curl $HOST/x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn its_own_command_lines_are_read_back() {
        let sent = request(
            "PATCH",
            "/a?b=c&d='",
            &[
                ("host", b"localhost:3000"),
                ("user-agent", b"x"),
                ("accept", b"y"),
                ("content-type", b"z"),
                ("e", b""),
            ],
            "it's \"ä\" $HOME \\ `x`\n".as_bytes(),
        );
        assert_eq!(parse(&command(&sent, &Reach::to("http://localhost:3000"))).unwrap(), sent);
    }
}
