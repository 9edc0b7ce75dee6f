"""Signs with the senders' libraries and sends through `local` and `agentd`: what is right passes, all else does not."""

import base64
import datetime
import hashlib
import hmac
import http.client
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import urllib.parse

import stripe
import svix
from slack_sdk.signature import SignatureVerifier
from standardwebhooks.webhooks import Webhook
from twilio.request_validator import RequestValidator

FOLDER = pathlib.Path(sys.argv[1])
BINARIES = pathlib.Path(os.environ["BINARIES"])
SECRETS = {
    "github": "It's a Secret to Everybody",
    "stripe": "whsec_0123456789abcdef",
    "slack": "8f742231b10e8888abcd99yyyzzz85a5",
    "standard": "whsec_" + base64.b64encode(bytes(range(32))).decode(),
    "twilio": "12345",
    "shopify": "hush",
}
JSON = '{"event":"paid","amount":12,"name":"Zoë"}'


class Upstream(http.server.BaseHTTPRequestHandler):
    """Takes everything, and keeps the bodies."""

    bodies = []

    def do_POST(self):
        Upstream.bodies.append(self.rfile.read(int(self.headers["content-length"] or 0)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def said(process, pattern):
    """The match in a line that a process prints."""
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise SystemExit(f"{process.args[0]} ended without a line like {pattern}")


def main():
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    local = subprocess.Popen(
        [BINARIES / "local", "--no-agent", "--public", "127.0.0.1:0", "--agents", "127.0.0.1:0", "--log-level", "error"],
        stdout=subprocess.PIPE, text=True)
    agent = None
    try:
        port = int(said(local, r"^public +\S+:(\d+)$")[1])
        edge = said(local, r"^agents +(\S+)$")[1]
        token = said(local, r"^token +(\S+)$")[1]
        config = f'[edge]\nurl = "{edge}"\ntoken_file = "{token}"\n[[tunnel]]\nname = "hooks"\nupstream = {upstream.server_port}\n'
        for scheme, secret in SECRETS.items():
            path = FOLDER / f"{scheme}.secret"
            path.touch(mode=0o600)
            path.write_text(f"{base64.b64encode(b'another').decode()}\n{secret}\n")
            config += f'[[tunnel.verify]]\nscheme = "{scheme}"\nsecret_file = "{path}"\npaths = ["/{scheme}"]\n'
        (FOLDER / "agentd.toml").write_text(config)
        agent = subprocess.Popen(
            [BINARIES / "agentd", "run", "--config", FOLDER / "agentd.toml", "--log-format", "human", "--log-level", "info"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return run(port)
    finally:
        for process in (agent, local):
            if process:
                process.terminate()
                process.wait()


def send(port, path, fields, body):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", path, body, {"host": f"hooks.localhost:{port}", **fields})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, answer.headers.get("x-tunnel-error")


def run(port):
    # The tunnel is there when it refuses what is not signed.
    end = time.time() + 60
    while send(port, "/github", {}, b"") != (401, "webhook_refused"):
        if time.time() > end:
            raise SystemExit("the tunnel does not open")
        time.sleep(0.1)
    cases = list(signed(port))
    failed = 0
    for name, path, fields, body, signature in cases:
        tries = wrong = 0
        # Changed first: what has been accepted is remembered.
        raw = body.encode()
        for at in range(len(raw)):
            tries, wrong = tries + 1, wrong + passes(port, path, fields, raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
        value = fields[signature]
        for at in range(len(value)):
            changed = chr(ord(value[at]) ^ 1)
            if changed.isprintable():
                changed = {**fields, signature: value[:at] + changed + value[at + 1:]}
                tries, wrong = tries + 1, wrong + passes(port, path, changed, raw)
        accepted = passes(port, path, fields, raw) and Upstream.bodies[-1] == raw
        good = accepted and not wrong
        failed += not good
        print(f"{'ok  ' if good else 'FAIL'} {name:28} {'accepted' if accepted else 'REFUSED '}  {tries} changed, {wrong} of them accepted")
    print(f"{len(cases) - failed} of {len(cases)} as they should be")
    return 1 if failed else 0


def passes(port, path, fields, body):
    status, code = send(port, path, fields, body)
    if status not in (200, 401) or (status == 401 and code != "webhook_refused"):
        raise SystemExit(f"{path}: {status} {code}")
    return status == 200


def signed(port):
    """Name, path, fields, body, and the field with the signature."""
    now = int(time.time())
    utc = datetime.datetime.fromtimestamp(now, datetime.timezone.utc)
    form = {"CallSid": "CA1", "From": "+12349013030", "Body": "Zoë & co", "Digits": "1234"}
    encoded = urllib.parse.urlencode(form)
    url = f"http://hooks.localhost:{port}/twilio?a=1&b=%20"
    asked = {"body": JSON, "secrets": SECRETS, "url": url, "form": form, "now": now}
    node = subprocess.run(["node", "sign.mjs"], cwd=FOLDER, input=json.dumps(asked), capture_output=True, text=True)
    if node.returncode:
        raise SystemExit(node.stderr)
    node = json.loads(node.stdout)
    kind = {"content-type": "application/json"}
    yield "github, @octokit", "/github", {**kind, **node["github"]}, JSON, "x-hub-signature-256"
    yield "stripe, npm", "/stripe", {**kind, **node["stripe"]}, JSON, "stripe-signature"
    v1 = stripe.WebhookSignature._compute_signature(f"{now}.{JSON}", SECRETS["stripe"])
    yield "stripe, PyPI", "/stripe", {**kind, "stripe-signature": f"t={now},v1={v1}"}, JSON, "stripe-signature"
    slack = SignatureVerifier(SECRETS["slack"]).generate_signature(timestamp=str(now), body=JSON)
    yield "slack, PyPI", "/slack", {**kind, "x-slack-request-timestamp": str(now), "x-slack-signature": slack}, JSON, "x-slack-signature"
    yield "standard, npm", "/standard", {**kind, **node["standard"]}, JSON, "webhook-signature"
    yield "svix, npm", "/standard", {**kind, **node["svix"]}, JSON, "svix-signature"
    for name, library in (("webhook", Webhook), ("svix", svix.Webhook)):
        fields = {f"{name}-id": f"msg_py_{name}", f"{name}-timestamp": str(now),
                  f"{name}-signature": library(SECRETS["standard"]).sign(f"msg_py_{name}", utc, JSON)}
        yield f"{name}, PyPI", "/standard", {**kind, **fields}, JSON, f"{name}-signature"
    kind = {"content-type": "application/x-www-form-urlencoded"}
    path = "/twilio?a=1&b=%20"
    yield "twilio form, npm", path, {**kind, **node["twilio"]}, encoded, "x-twilio-signature"
    twilio = RequestValidator(SECRETS["twilio"])
    yield "twilio form, PyPI", path, {**kind, "x-twilio-signature": twilio.compute_signature(url, form)}, encoded, "x-twilio-signature"
    newer = {"x-twilio-webhooks-signature-settings": "key=k,algorithm=HMAC_SHA256",
             "x-twilio-signature": twilio.compute_signature(url, form, "HMAC_SHA256")}
    yield "twilio form, SHA-256, PyPI", path, {**kind, **newer}, encoded, "x-twilio-signature"
    path = f"/twilio?bodySHA256={hashlib.sha256(JSON.encode()).hexdigest()}"
    fields = {"content-type": "application/json",
              "x-twilio-signature": twilio.compute_signature(f"http://hooks.localhost:{port}{path}", {})}
    yield "twilio JSON, PyPI", path, fields, JSON, "x-twilio-signature"
    # Shopify's libraries verify only; the formula is the one that they compute.
    digest = base64.b64encode(hmac.new(SECRETS["shopify"].encode(), JSON.encode(), hashlib.sha256).digest()).decode()
    for name in ("x-shopify-hmac-sha256", "shopify-hmac-sha256"):
        yield f"shopify, {name[:-12]}", "/shopify", {"content-type": "application/json", name: digest}, JSON, name


sys.exit(main())
