// An archive of packages behind the tunnel: update, nothing new, and a package.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import { once } from 'node:events';
import { freePort, venv } from '../../place.mjs';

export const title = 'apt: update and download';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export function lacks() {
  try {
    execFileSync('apt-get', ['--version'], { stdio: 'ignore' });
    execFileSync('dpkg-deb', ['--version'], { stdio: 'ignore' });
    return undefined;
  } catch {
    return 'there is no apt-get or no dpkg-deb';
  }
}

export async function run(place) {
  const port = await freePort();
  await archive(place);
  await place.app(port, venv('python'), ['-m', 'http.server', '--bind', '127.0.0.1', '--directory', 'archive', String(port)]);
  await place.tunnel(String(port));

  const proxy = await toThisMachine(place.edge.port);
  try {
    for (const folder of ['lists/partial', 'cache/archives/partial', 'state', 'sources.d', 'trusted', 'conf.d']) {
      mkdirSync(`${place.folder}/${folder}`, { recursive: true });
    }
    writeFileSync(`${place.folder}/status`, '');
    writeFileSync(`${place.folder}/sources`, `deb [trusted=yes] ${place.url} ./\n`);
    const own = {
      'Dir::Etc::SourceList': 'sources', 'Dir::Etc::SourceParts': 'sources.d', 'Dir::Etc::Parts': 'conf.d',
      'Dir::Etc::TrustedParts': 'trusted', 'Dir::State': 'state', 'Dir::State::Lists': 'lists', 'Dir::State::Status': 'status',
      'Dir::Cache': 'cache',
    };
    const options = Object.entries(own).map(([name, value]) => `-o${name}=${place.folder}/${value}`);
    options.push(`-oAcquire::http::Proxy=http://127.0.0.1:${proxy.address().port}`, '-oAcquire::Languages=none', '-oAPT::Sandbox::User=');
    const apt = (...args) => place.run('apt-get', [...options, ...args]);
    assert.match(await apt('update'), /^Get:\d+ .* Release$/m);
    assert.match(await apt('update'), /^Hit:\d+ .* Release$/m);
    await apt('download', 'noise');
    const got = readdirSync(place.folder).find((name) => name.endsWith('.deb'));
    assert.deepEqual(readFileSync(`${place.folder}/${got}`), readFileSync(`${place.folder}/archive/noise.deb`));
  } finally {
    proxy.close();
    proxy.closeAllConnections();
  }
}

async function archive(place) {
  const root = `${place.folder}/package`;
  mkdirSync(`${root}/DEBIAN`, { recursive: true });
  mkdirSync(`${place.folder}/archive`);
  const control = ['Package: noise', 'Version: 1', 'Architecture: all', 'Maintainer: Ada <ada@example.test>', 'Description: noise'];
  writeFileSync(`${root}/DEBIAN/control`, `${control.join('\n')}\n`);
  mkdirSync(`${root}/usr/share/noise`, { recursive: true });
  writeFileSync(`${root}/usr/share/noise/noise`, Buffer.alloc(1 << 20, 'noise'));
  await place.run('dpkg-deb', ['--build', '-Znone', root, 'archive/noise.deb']);
  const described = (path, list) => {
    const bytes = readFileSync(`${place.folder}/archive/${path}`);
    const sum = createHash('sha256').update(bytes).digest('hex');
    return list ? ` ${sum} ${bytes.length} ${path}` : `Filename: ./${path}\nSize: ${bytes.length}\nSHA256: ${sum}`;
  };
  writeFileSync(`${place.folder}/archive/Packages`, `${control.join('\n')}\n${described('noise.deb')}\n`);
  const date = new Date().toUTCString().replace('GMT', 'UTC');
  writeFileSync(`${place.folder}/archive/Release`, `Date: ${date}\nSHA256:\n${described('Packages', true)}\n`);
}

/** apt cannot be told where a name is; a proxy can. It passes on what it is sent. */
async function toThisMachine(port) {
  const proxy = http.createServer((request, response) => {
    const { pathname, search } = new URL(request.url);
    const { method, headers } = request;
    const onwards = http.request({ host: '127.0.0.1', port, method, headers, path: pathname + search }, (answer) => {
      response.writeHead(answer.statusCode, answer.statusMessage, answer.headers);
      answer.pipe(response);
    });
    onwards.on('error', () => response.destroy());
    request.pipe(onwards);
  });
  proxy.listen(0, '127.0.0.1');
  await once(proxy, 'listening');
  return proxy;
}
