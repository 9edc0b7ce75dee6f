"""httpbin on a free port; says where, and serves until it is ended."""

import threading

from httpbin import app
from pytest_httpbin import serve

server = serve.Server(application=app)
server.start()
print(f"http://127.0.0.1:{server.port}", flush=True)
threading.Event().wait()
