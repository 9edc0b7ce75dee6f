"""Reads a HAR file with haralyzer: every attribute of every entry."""

import sys

from haralyzer import HarParser

parser = HarParser.from_file(sys.argv[1])
entries = parser.har_data["entries"]
assert parser.creator["name"] == "agentd", parser.creator
seen = 0
for page in parser.pages:
    for entry in page.entries:
        seen += 1
        assert entry.request.method and entry.request.url.startswith("http"), entry
        assert entry.startTime.tzinfo is not None
        for value in (entry.time, entry.timings, entry.request.headers, entry.request.cookies, entry.request.queryString,
                      entry.request.bodySize, entry.response.status, entry.response.headers, entry.response.mimeType,
                      entry.response.contentSize, entry.response.text):
            assert value is not None, entry
assert seen == len(entries) >= 30, (seen, len(entries))
print(f"haralyzer: {seen} entries")
