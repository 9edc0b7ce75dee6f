// A redirect that Flask makes absolute: of `/d` to `/d/`.
import assert from 'node:assert/strict';
import { freePort, venv } from '../../place.mjs';

export const title = 'Flask 3.1: redirect of a folder';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  await place.app(port, venv('flask'), ['--app', `${place.source}/app.py`, 'run', '--port', port]);
  await place.tunnel(String(port));
  const head = await place.curl('--head', `${place.url}/d?q=1`);
  assert.match(head, /^HTTP\/1.1 308 /);
  assert.match(head.toLowerCase(), new RegExp(`^location: ${place.url}/d/\\?q=1\r$`, 'm'));
  assert.equal(await place.curl('--location', `${place.url}/d`), 'the folder');
}
