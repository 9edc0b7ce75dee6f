#!/usr/bin/env bash
# ws (npm, 8.23.0): a message in more than 16,384 fragments is refused, however small it is.
#
# Expected: a limit by size, as the documented maxPayload (100 MiB) is; RFC 6455 sets no number of fragments.
# Seen:     16,384 fragments of one byte pass, one more closes the connection with 1008.
# Source:   lib/receiver.js, `maxFragments`; Python's websockets has the same at 4,096 fragments (1009).
# For us:   what carries messages between others must not cut them into many small frames.
# Needs:    Node.js with npm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes >/dev/null
npm install --silent --no-audit --no-fund --ignore-scripts ws@8.23.0
cat >try.cjs <<'JS'
const { WebSocket, WebSocketServer } = require('ws');

const outcome = (fragments) =>
  new Promise((resolve, reject) => {
    const server = new WebSocketServer({ host: '127.0.0.1', port: 0 }, () => {
      const client = new WebSocket(`ws://127.0.0.1:${server.address().port}/`);
      client.on('error', reject);
      client.on('close', (code) => done(`closed with ${code}`));
      client.on('open', () => {
        for (let at = 1; at <= fragments; at += 1) client.send('x', { fin: at === fragments });
      });
    });
    const done = (result) => {
      resolve(result);
      server.clients.forEach((one) => one.terminate());
      server.close();
    };
    server.on('connection', (socket) => {
      socket.on('error', () => {});
      socket.on('message', (data) => done(`a message of ${data.length} bytes`));
    });
  });

(async () => {
  const at = await outcome(16384);
  const past = await outcome(16385);
  console.log(`16,384 fragments: ${at}`);
  console.log(`16,385 fragments: ${past}`);
  if (at !== 'a message of 16384 bytes' || past !== 'closed with 1008') throw new Error('no longer as described');
  console.log('as described: the number of fragments is limited');
})();
JS
node try.cjs
