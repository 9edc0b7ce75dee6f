// git over HTTP: clone, a push of 2 MB, which git sends in chunks, and the clone of that.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { freePort } from '../../place.mjs';

export const title = 'git: clone and push';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  const nobody = { GIT_CONFIG_GLOBAL: '/dev/null', GIT_CONFIG_SYSTEM: '/dev/null', HOME: place.folder, GIT_TERMINAL_PROMPT: '0' };
  const who = ['-c', 'user.name=Ada', '-c', 'user.email=ada@example.test'];
  const known = ['-c', `http.curloptResolve=${place.authority}:127.0.0.1`];
  const git = (...args) => place.run('git', [...who, ...known, ...args], { env: nobody });
  await git('init', '--quiet', '--bare', 'here/one.git');
  await git('-C', 'here/one.git', 'config', 'http.receivepack', 'true');
  await place.app(port, process.execPath, [`${place.source}/server.mjs`, String(port), `${place.folder}/here`], { env: nobody });
  await place.tunnel(String(port));

  await git('clone', '--quiet', `${place.url}/one.git`, 'work');
  writeFileSync(`${place.folder}/work/noise`, randomBytes(2 << 20));
  await git('-C', 'work', 'add', '.');
  await git('-C', 'work', 'commit', '--quiet', '--message', 'noise');
  await git('-C', 'work', 'push', '--quiet', 'origin', 'HEAD');
  await git('clone', '--quiet', `${place.url}/one.git`, 'again');
  assert.equal(await git('-C', 'again', 'rev-parse', 'HEAD'), await git('-C', 'work', 'rev-parse', 'HEAD'));
}
