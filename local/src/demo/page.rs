//! The page itself: facts enter, HTML leaves.

use std::{
    fmt::{self, Write as _},
    net::SocketAddr,
};

use crate::states::trace::TraceSnapshot;

/// What is known about the request that asks for the page.
#[derive(Debug)]
pub(super) struct Facts {
    /// Where the public reaches this tunnel.
    pub(super) url: String,
    pub(super) client: String,
    pub(super) request_id: String,
    /// The `ingress` process that serves it.
    pub(super) process: Option<String>,
    pub(super) run: Option<TraceSnapshot>,
    pub(super) arrived_at_front_us: Option<u64>,
    pub(super) arrived_here_us: u64,
    pub(super) agents: SocketAddr,
    pub(super) token_file: String,
}

/// Text that is safe in HTML, also within quotes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#1d1c1a;--soft:#6a665f;--line:#e4e0d8;--mark:#b4470f;--code:#f3f0ea}\
@media(prefers-color-scheme:dark){:root{--ground:#161513;--card:#1f1d1a;--ink:#eeebe5;--soft:#a09a8f;--line:#35322c;--mark:#f0925a;--code:#292621}}\
*{box-sizing:border-box}\
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif}\
main{max-width:46rem;margin:0 auto;padding:3rem 1.25rem 4rem}\
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .5rem;letter-spacing:-.01em}\
h2{font-size:1.05rem;margin:2.5rem 0 .75rem}\
p{margin:.5rem 0}.soft{color:var(--soft)}\
ol{list-style:none;margin:0;padding:0;background:var(--card);border:1px solid var(--line);border-radius:.75rem}\
li{position:relative;padding:.7rem 1rem .7rem 2.6rem;border-top:1px solid var(--line)}\
li:first-child{border-top:0}\
li::before{content:'';position:absolute;left:1.1rem;top:1.25rem;width:.55rem;height:.55rem;border-radius:50%;background:var(--mark)}\
li:not(:last-child)::after{content:'';position:absolute;left:1.34rem;top:1.9rem;bottom:-1.15rem;width:1px;background:var(--mark);opacity:.45}\
.at{float:right;color:var(--soft);font-variant-numeric:tabular-nums;font-size:.875rem}\
.what{color:var(--soft);font-size:.9rem;overflow-wrap:anywhere}\
table{width:100%;border-collapse:collapse;margin:.4rem 0 0;font-size:.875rem}\
td{padding:.15rem 0;vertical-align:top}\
td+td{text-align:right;color:var(--soft);font-variant-numeric:tabular-nums;white-space:nowrap}\
pre{margin:.5rem 0;padding:.8rem 1rem;background:var(--code);border:1px solid var(--line);border-radius:.5rem;white-space:pre-wrap;overflow-wrap:anywhere;font:.875rem/1.5 ui-monospace,monospace;user-select:all}\
code{font:.9em ui-monospace,monospace}\
a{color:var(--mark)}";

/// Makes the page.
pub(super) fn render(facts: &Facts) -> String {
    let mut page = String::with_capacity(8 * 1024);
    write_page(&mut page, facts).expect("writing to memory does not fail");
    page
}

fn write_page(page: &mut String, facts: &Facts) -> fmt::Result {
    let url = Escaped(&facts.url);
    write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>Your tunnel works</title>\n<style>{STYLE}</style>\n<main>\n\
         <h1>Your tunnel works</h1>\n\
         <p>This page came to you from a private service on this machine, through the whole edge: the same \
         functions and the same state machine that run in your AWS account.</p>\n\
         <h2>How this request travelled</h2>\n<ol>\n"
    )?;
    write_hops(page, facts)?;
    write!(
        page,
        "</ol>\n<p class=\"soft\">Times are counted from the front. Reload the page: the first request of a \
         process is the slow one.</p>\n\
         <h2>Expose your own service</h2>\n\
         <p>Whatever listens on port 3000, as <code>web</code>:</p>\n\
         <pre>cargo run --release -p agentd -- http 3000 --name web --edge ws://{agents} --token-file {token}</pre>\n\
         <p>Then open</p>\n<pre>{web}</pre>\n\
         <p>Or have this tunnel show it from the beginning:</p>\n\
         <pre>cargo run --release -p local -- --upstream 3000</pre>\n\
         <h2>Try it</h2>\n\
         <p>What arrives, as it arrives: any method, any field, any body.</p>\n\
         <pre>curl -X PATCH {url}/echo?a=1 -H 'X-Hello: world' -d 'some body'</pre>\n\
         <p>An answer that takes ten seconds, each event sent on at once.</p>\n\
         <pre>curl -N {url}/events</pre>\n\
         <p class=\"soft\">A click selects a whole command.</p>\n</main>\n</html>\n",
        agents = facts.agents,
        token = Escaped(&facts.token_file),
        web = Escaped(&other_tunnel(&facts.url, "web")),
    )
}

fn write_hops(page: &mut String, facts: &Facts) -> fmt::Result {
    let begun_us = facts.arrived_at_front_us;
    let since = |us: Option<u64>| Some(us?.saturating_sub(begun_us?));
    let run_begun_us = facts.run.as_ref().map(|run| run.started_ms * 1000);
    write_hop(page, "Public client", None, &facts.client, "")?;
    write_hop(page, "Front", since(begun_us), "a Lambda Function URL, on loopback", "")?;
    let process = facts.process.as_deref().unwrap_or("a process of the function");
    write_hop(page, "Function ingress", None, &format!("{process}, request {}", facts.request_id), "")?;
    let mut states = String::new();
    if let Some(run) = &facts.run {
        states.push_str("<table>");
        for span in &run.states {
            write!(states, "<tr><td><code>{}</code><td>", Escaped(&span.state))?;
            match span.exited_us {
                Some(exited) => {
                    write!(states, "{} µs", exited.saturating_sub(span.entered_us))?;
                }
                None => states.push_str("still here, waiting for this very answer"),
            }
        }
        states.push_str("</table>");
    }
    // The run's begin is known in whole milliseconds; it is never before the request's own.
    let run_begun_us = run_begun_us.map(|us| us.max(begun_us.unwrap_or(us)));
    write_hop(page, "Run of public_request", since(run_begun_us), "an Express state machine", &states)?;
    write_hop(page, "Agent link", None, "a WebSocket, at the agent's own request", "")?;
    write_hop(page, "Agent", None, "agentd, next to the service", "")?;
    write_hop(page, "Upstream", since(Some(facts.arrived_here_us)), "this page", "")
}

/// Writes one hop; `more` is HTML already.
fn write_hop(page: &mut String, name: &str, at_us: Option<u64>, what: &str, more: &str) -> fmt::Result {
    page.push_str("<li>");
    if let Some(us) = at_us {
        write!(page, "<span class=\"at\">{}.{:03} ms</span>", us / 1000, us % 1000)?;
    }
    writeln!(
        page,
        "<strong>{}</strong><br><span class=\"what\">{}</span>{more}</li>",
        Escaped(name),
        Escaped(what)
    )
}

/// The address of another tunnel beside this one.
fn other_tunnel(url: &str, name: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    match host.split_once('.') {
        // In path mode the first segment names the tunnel.
        _ if !path.is_empty() => format!("{scheme}://{host}/{name}/"),
        Some((_, domain)) => format!("{scheme}://{name}.{domain}/"),
        None => format!("{scheme}://{host}/{name}/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_tunnels_are_found_in_both_modes() {
        for (url, other) in [
            ("http://demo.localhost:8080", "http://web.localhost:8080/"),
            ("http://127.0.0.1:8080/demo", "http://127.0.0.1:8080/web/"),
            ("http://localhost", "http://localhost/web/"),
        ] {
            assert_eq!(other_tunnel(url, "web"), other);
        }
    }
}
