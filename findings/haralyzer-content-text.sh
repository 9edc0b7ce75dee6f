#!/usr/bin/env bash
# haralyzer (PyPI, 2.4.0): reading the text of a response that has none raises KeyError.
#
# Expected: HAR 1.2 makes `content.text` optional (a response without a body, or one that was not kept), so an
#           attribute for it gives nothing.
# Seen:     KeyError at `entry.response.text`.
# Source:   the HAR 1.2 specification, object "content"; haralyzer/http.py.
# For us:   an export always writes `text`, empty where there is none.
# Needs:    python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check haralyzer==2.4.0
"$folder/venv/bin/python" - <<'PY'
from haralyzer import HarParser


def entry(content):
    return {
        "startedDateTime": "2026-06-01T12:00:00.000Z", "time": 1, "pageref": "page_1",
        "request": {"method": "GET", "url": "http://127.0.0.1/", "httpVersion": "HTTP/1.1", "cookies": [],
                    "headers": [], "queryString": [], "headersSize": -1, "bodySize": 0},
        "response": {"status": 204, "statusText": "No Content", "httpVersion": "HTTP/1.1", "cookies": [],
                     "headers": [], "content": content, "redirectURL": "", "headersSize": -1, "bodySize": 0},
        "cache": {}, "timings": {"send": 0, "wait": 1, "receive": 0},
    }


def text(content):
    page = {"id": "page_1", "startedDateTime": "2026-06-01T12:00:00.000Z", "title": "t",
            "pageTimings": {"onContentLoad": -1, "onLoad": -1}}
    har = {"log": {"version": "1.2", "creator": {"name": "t", "version": "1"}, "pages": [page],
                   "entries": [entry(content)]}}
    try:
        return repr(HarParser(har).pages[0].entries[0].response.text)
    except KeyError as error:
        return f"KeyError({error})"


bare = text({"size": 0, "mimeType": "x-unknown"})
given = text({"size": 0, "mimeType": "x-unknown", "text": ""})
print(f"without text: {bare}; with an empty one: {given}")
assert bare == "KeyError('text')" and given == "''", "no longer as described"
print("as described: the optional member is wanted")
PY
