#!/usr/bin/env bash
# @microsoft/fetch-event-source (npm, 2.0.1): a blank line alone is delivered as a message.
#
# Expected: the event stream format dispatches an event only where a block has data; a comment with a blank line
#           behind it, the usual keep-alive, is nothing.
# Seen:     an empty message for each keep-alive. A client that parses `data` as JSON fails on it.
# Source:   the format: WHATWG HTML, "event stream interpretation" (an empty data buffer dispatches nothing);
#           the package's parse.js calls `onMessage` at each empty line.
# For us:   whoever keeps a stream alive on its way writes a comment line alone, without a blank line.
# Needs:    Node.js with npm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes >/dev/null
npm install --silent --no-audit --no-fund --ignore-scripts @microsoft/fetch-event-source@2.0.1
cat >try.cjs <<'JS'
const { getLines, getMessages } = require('@microsoft/fetch-event-source/lib/cjs/parse.js');
const heard = (text) => {
  const messages = [];
  const feed = getLines(getMessages(() => {}, () => {}, (message) => messages.push(message.data)));
  feed(new TextEncoder().encode(text));
  return messages;
};
const block = heard(': keep-alive\n\ndata: one\n\n');
const line = heard(': keep-alive\ndata: one\n\n');
console.log('comment and blank line, then data: one ->', JSON.stringify(block));
console.log('comment line alone, then data: one     ->', JSON.stringify(line));
if (JSON.stringify(block) !== '["","one"]') throw new Error('a keep-alive is no message any more');
if (JSON.stringify(line) !== '["one"]') throw new Error('something else has changed');
console.log('as described: a message for the keep-alive block, none for the comment line');
JS
node try.cjs
