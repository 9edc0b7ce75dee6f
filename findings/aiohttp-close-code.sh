#!/usr/bin/env bash
# aiohttp (PyPI, 3.14.5): a WebSocket server answers every close with code 1000.
#
# Expected: RFC 6455 5.5.1: an endpoint that answers a close frame typically echoes the status code it received,
#           as ws, websockets and tungstenite do.
# Seen:     the client closes with 4001 and reads 1000 in the answer.
# Source:   RFC 6455 section 5.5.1; run below with websockets 17.4 as the client.
# For us:   what a public client is told is the code that its own side or the upstream began with, never the answer's.
# Needs:    python3 with venv.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5 websockets==17.4
"$folder/venv/bin/python" - <<'PY'
import asyncio
import aiohttp.web
import websockets


async def echo_aiohttp(request):
    socket = aiohttp.web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        await socket.send_str(message.data)
    return socket


async def answered(port):
    async with websockets.connect(f"ws://127.0.0.1:{port}/") as socket:
        await socket.close(4001, "done")
        return socket.protocol.close_rcvd.code


async def main():
    app = aiohttp.web.Application()
    app.add_routes([aiohttp.web.get("/", echo_aiohttp)])
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    aiohttp_says = await answered(site._server.sockets[0].getsockname()[1])
    await runner.cleanup()

    async def echo(socket):
        try:
            async for message in socket:
                await socket.send(message)
        except websockets.ConnectionClosed:
            # Its way to say that the code was not 1000.
            pass

    async with websockets.serve(echo, "127.0.0.1", 0) as server:
        websockets_says = await answered(server.sockets[0].getsockname()[1])
    print(f"closed with 4001: aiohttp answers {aiohttp_says}, websockets answers {websockets_says}")
    assert (aiohttp_says, websockets_says) == (1000, 4001), "no longer as described"
    print("as described: aiohttp answers 1000 whatever it was closed with")


asyncio.run(main())
PY
