// WebDAV of nginx, which compares the host of Destination with Host.
import { execFileSync } from 'node:child_process';
import { chmodSync, mkdirSync, writeFileSync } from 'node:fs';
import { freePort } from '../../place.mjs';
import { moves } from '../webdav/case.mjs';

export const title = 'WebDAV, nginx of the machine: MOVE';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

const PATHS = { env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin` } };

export function lacks() {
  try {
    const built = execFileSync('sh', ['-c', 'nginx -V 2>&1'], PATHS).toString();
    return built.includes('http_dav_module') ? undefined : 'this nginx has no WebDAV';
  } catch {
    return 'there is no nginx';
  }
}

export async function run(place) {
  const port = await freePort();
  mkdirSync(`${place.folder}/files`);
  // Its workers have another user where it is started by root.
  for (const folder of [place.folder, `${place.folder}/files`]) chmodSync(folder, 0o777);
  writeFileSync(
    `${place.folder}/nginx.conf`,
    `daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1;
${process.getuid() === 0 ? 'user root;' : ''}
events {}
http {
  access_log off;
  client_body_temp_path body; proxy_temp_path p; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
  server {
    listen 127.0.0.1:${port};
    root files;
    dav_methods PUT DELETE MKCOL COPY MOVE;
  }
}
`,
  );
  await place.app(port, 'nginx', ['-p', place.folder, '-c', `${place.folder}/nginx.conf`, '-e', 'stderr'], PATHS);
  await place.tunnel(String(port));
  await moves(place);
}
