// WebDAV: MOVE, whose Destination is an address.
import assert from 'node:assert/strict';
import { mkdirSync } from 'node:fs';
import { freePort, venv } from '../../place.mjs';

export const title = 'WebDAV, wsgidav 4.4: MOVE';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  mkdirSync(`${place.folder}/files`);
  await place.app(port, venv('wsgidav'), ['--host', '127.0.0.1', '--port', String(port), '--root', 'files', '--auth', 'anonymous', '--no-config']);
  await place.tunnel(String(port));
  await moves(place);
}

/** Puts a file, moves it there and back, by address. */
export async function moves(place) {
  const status = (...args) => place.curl('--output', '/dev/null', '--write-out', '%{http_code}', ...args);
  assert.equal(await status('--request', 'PUT', '--data-binary', 'words', `${place.url}/one.txt`), '201');
  assert.equal(await status('--request', 'MOVE', '--header', `Destination: ${place.url}/two.txt`, `${place.url}/one.txt`).then(made), true);
  assert.equal(await place.curl(`${place.url}/two.txt`), 'words');
  assert.equal(await status(`${place.url}/one.txt`), '404');
  assert.equal(await status('--request', 'COPY', '--header', `Destination: ${place.url}/one.txt`, `${place.url}/two.txt`).then(made), true);
  assert.equal(await place.curl(`${place.url}/one.txt`), 'words');
}

const made = (status) => status === '201' || status === '204';
