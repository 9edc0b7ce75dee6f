//! The page: files that are part of the binary, and the policy that keeps a browser from taking anything in them, or
//! in what they show, for more than it is.

/// What the browser may do with the page: run and style with these files, ask this address, show pictures that are
/// written out in the page. Markup is made from text in one place alone, the frame of a picture, which may do nothing.
pub(crate) const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
     require-trusted-types-for 'script'; trusted-types preview";

const DOCUMENT: &str = include_str!("page/index.html");
const STYLE: (&str, &str) = ("text/css; charset=utf-8", include_str!("page/page.css"));

/// A file of the page: its media type and its text.
pub(crate) fn file(path: &str) -> Option<(&'static str, &'static str)> {
    let script = |text| Some(("text/javascript; charset=utf-8", text));
    match path {
        "/page.css" => Some(STYLE),
        "/page.js" => script(include_str!("page/page.js")),
        "/api.js" => script(include_str!("page/api.js")),
        "/body.js" => script(include_str!("page/body.js")),
        "/deliveries.js" => script(include_str!("page/deliveries.js")),
        "/detail.js" => script(include_str!("page/detail.js")),
        "/dom.js" => script(include_str!("page/dom.js")),
        "/edit.js" => script(include_str!("page/edit.js")),
        "/list.js" => script(include_str!("page/list.js")),
        _ => None,
    }
}

/// The document, HTML, with the token that calls of the page carry: letters, digits, `-` and `_`.
pub(crate) fn document(token: &str) -> String {
    DOCUMENT.replace("{{token}}", token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scripts() -> impl Iterator<Item = (&'static str, &'static str)> {
        let names = [
            "/page.js",
            "/api.js",
            "/body.js",
            "/deliveries.js",
            "/detail.js",
            "/dom.js",
            "/edit.js",
            "/list.js",
        ];
        names.into_iter().map(|name| (name, file(name).unwrap().1))
    }

    /// What stands between two quotes behind each `before`.
    fn quoted<'t>(text: &'t str, before: &'t str) -> impl Iterator<Item = &'t str> {
        text.split(before).skip(1).filter_map(|rest| rest.split('"').next())
    }

    #[test]
    fn every_file_that_is_named_is_there() {
        let named = quoted(DOCUMENT, "src=\"").chain(quoted(DOCUMENT, "href=\""));
        for name in named.filter(|name| !name.starts_with("data:")) {
            assert!(file(name).is_some(), "{name}");
        }
        for (from, text) in scripts() {
            for name in quoted(text, "from \".") {
                assert!(file(name).is_some(), "{from} imports {name}");
            }
        }
        assert_eq!(document("t_o-k3n").matches("content=\"t_o-k3n\"").count(), 1);
    }

    #[test]
    fn nothing_becomes_markup_but_the_frame_of_a_picture() {
        let mut frames = 0;
        for (name, text) in scripts() {
            for way in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "DOMParser",
                "eval(",
                "Function(",
            ] {
                assert!(!text.contains(way), "{name} uses {way}");
            }
            frames += text.matches("srcdoc = ").count();
        }
        assert_eq!(frames, 1);
        for way in ["<style", " style=", " onclick=", "<script>"] {
            assert!(!DOCUMENT.contains(way), "the document has {way}");
        }
    }

    #[test]
    fn nothing_is_fetched_from_elsewhere() {
        // The name of a vocabulary is no address.
        let own = DOCUMENT.replace("http://www.w3.org/2000/svg", "").replace("https://web.example.com", "");
        let clean = |name: &str, text: &str| {
            for way in ["http://", "https://", " url(", ":url("] {
                assert!(!text.contains(way), "{name} has {way}");
            }
        };
        clean("index.html", &own);
        clean("page.css", STYLE.1);
        for (name, text) in scripts() {
            clean(name, text);
        }
    }
}
