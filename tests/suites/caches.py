"""Compares two results of http-cache-tests, test by test: where the tunnel is between, nothing may be cached or changed."""

import json
import sys

direct, tunnel = (json.load(open(path)) for path in sys.argv[1:3])
# The suite's server says 999, which is no status of HTTP (RFC 9110, section 15), where it misses a condition.
NO_STATUS = "should have been conditional, but it was not"
# It answers with a transfer coding that nobody knows, whose content nobody can hand on (RFC 9112, section 7).
UNKNOWN_CODING = "headers-store-Transfer-Encoding"
differ, honest = [], 0
for name in sorted(direct.keys() | tunnel.keys()):
    before, after = direct.get(name), tunnel.get(name)
    if before == after:
        continue
    is_502 = isinstance(after, list) and after[1].endswith("status is 502, not 200")
    broke_off = isinstance(before, list) and before[0] == "FetchError"
    if (is_502 and (NO_STATUS in str(before) or name == UNKNOWN_CODING)) or (broke_off and after is not True):
        honest += 1
    else:
        differ.append(name)
        print(f"DIFFERS {name}: directly {before}, through the tunnel {after}")
print(
    f"{len(tunnel)} tests of caches, {len(differ)} differ from direct; in {honest} the server says what is no HTTP or breaks off, which is 502 through the tunnel"
)
sys.exit(bool(differ) or not tunnel)
