"""Slow clients, as slowhttptest has them: heads, bodies and readers that hardly move, many at a time.

    slow.py serve               an upstream of its own, on a free port; says where
    slow.py try NAME URL        slow clients against URL, and beside them one that is not slow: each of its requests
                                has to be answered within five seconds

Prints one line; exits 1 where the quick client was not served, or a slow one was told something untrue.
"""

import http.server
import socket
import sys
import threading
import time
import urllib.parse

EACH = 50
SECONDS = 30
BODY = 1024 * 1024
PATIENCE = 5


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(b"x" * BODY if self.path == "/large" else b"ok")

    def do_POST(self):
        self.answer(b"%d" % len(self.rfile.read(int(self.headers["content-length"]))))

    def log_message(self, *_):
        pass


def serve():
    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 1024
        daemon_threads = True

        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


class Slow:
    """One slow client: `piece` a second, and what it has been told so far."""

    def __init__(self, address, first, piece, reads):
        self.socket = socket.socket()
        if reads:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(address)
        self.socket.setblocking(False)
        self.piece, self.reads = piece, reads
        self.got = b""
        self.ended = None
        self.send(first)

    def send(self, data):
        try:
            self.socket.send(data)
        except BlockingIOError:
            pass
        except OSError as error:
            self.end(type(error).__name__)

    def end(self, how):
        self.ended = self.ended or how

    def turn(self):
        if self.ended:
            return
        if self.piece:
            self.send(self.piece)
        try:
            data = self.socket.recv(256 if self.reads else 65536)
            self.got += data
            if not data:
                self.end("closed")
        except BlockingIOError:
            pass
        except OSError as error:
            self.end(type(error).__name__)

    def status(self):
        return self.got.split(b" ")[1].decode() if self.got.startswith(b"HTTP/1.1 ") else None


def ask(address, host):
    with socket.create_connection(address, timeout=PATIENCE) as connection:
        connection.settimeout(PATIENCE)
        connection.sendall(f"GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"ok")


def attempt(name, url):
    parts = urllib.parse.urlsplit(url)
    address, host = ("127.0.0.1", parts.port), parts.netloc
    head = f" HTTP/1.1\r\nhost: {host}\r\n"
    kinds = {
        "heads": lambda: Slow(address, f"GET /{head}".encode(), b"x-more: 1\r\n", False),
        "bodies": lambda: Slow(address, f"POST /{head}content-length: 4096\r\n\r\n".encode(), b"x", False),
        "readers": lambda: Slow(address, f"GET /large{head}\r\n".encode(), b"", True),
    }
    clients = {kind: [make() for _ in range(EACH)] for kind, make in kinds.items()}
    over = threading.Event()
    served, failed, longest = 0, [], 0.0

    def quick():
        nonlocal served, longest
        while not over.is_set():
            began = time.monotonic()
            try:
                right = ask(address, host)
            except OSError as error:
                right = False
                failed.append(repr(error))
            else:
                failed.extend([] if right else ["another answer"])
            served += right
            longest = max(longest, time.monotonic() - began)
            over.wait(0.1)

    asking = threading.Thread(target=quick)
    asking.start()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        for client in (client for each in clients.values() for client in each):
            client.turn()
        over.wait(1)
    over.set()
    asking.join()

    untrue = []
    said = []
    for kind, each in clients.items():
        statuses = {}
        for client in each:
            status = client.status()
            statuses[status] = statuses.get(status, 0) + 1
            # None of them has asked for all of it, or said all of it, so nothing but a refusal can have ended.
            if status == "200" and kind != "readers":
                untrue.append(kind)
        ended = sum(client.ended is not None for client in each)
        told = ", ".join(f"{count} x {status}" for status, count in statuses.items() if status)
        said.append(f"{kind}: {ended} ended{f' ({told})' if told else ''}")
    print(
        f"{name}: {EACH} slow clients of each kind for {SECONDS} s; beside them {served} requests served, {len(failed)} not,"
        f" longest {longest * 1000:.0f} ms; {'; '.join(said)}"
    )
    for reason in sorted(set(failed + untrue)):
        print(f"  {reason}")
    return bool(failed or untrue or not served)


if sys.argv[1] == "serve":
    serve()
sys.exit(attempt(sys.argv[2], sys.argv[3]))
