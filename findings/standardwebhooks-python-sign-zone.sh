#!/usr/bin/env bash
# standardwebhooks (Python, 1.1.0): `Webhook.sign` replaces the time zone of an aware datetime instead of converting it.
#
# Expected: one instant has one Unix time, whatever zone it is written in, so 14:00+02:00 and 12:00Z sign alike.
# Seen:     14:00+02:00 is signed as 14:00Z, two hours ahead; the signature carries over to every verifier that
#           allows five minutes, and is refused by it, although the sender's clock was right.
# Source:   standardwebhooks/webhooks.py, `sign`.
# For us:   a verifier has to say "timestamp out of tolerance" apart from "signature wrong", or this is not found.
# Needs:    python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check standardwebhooks==1.1.0
"$folder/venv/bin/python" - <<'PY'
import datetime
from standardwebhooks.webhooks import Webhook

secret = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
hook = Webhook(secret)
utc = datetime.datetime(2026, 6, 1, 12, 0, tzinfo=datetime.timezone.utc)
berlin = utc.astimezone(datetime.timezone(datetime.timedelta(hours=2)))
assert utc == berlin and utc.timestamp() == berlin.timestamp()
signed = {name: hook.sign("msg_1", at, '{"a":1}') for name, at in
          {"12:00Z": utc, "14:00+02:00": berlin, "14:00Z": utc + datetime.timedelta(hours=2)}.items()}
for name, signature in signed.items():
    print(f"{name:<12} {signature}")
assert signed["12:00Z"] != signed["14:00+02:00"], "the zone is converted now"
assert signed["14:00Z"] == signed["14:00+02:00"], "something else has changed"
print("as described: the same instant in another zone is signed as another one")
PY
