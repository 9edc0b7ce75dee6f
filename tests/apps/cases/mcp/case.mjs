// A client of the Model Context Protocol: initialise, list, call with progress over a stream, end.
import assert from 'node:assert/strict';
import { freePort } from '../../place.mjs';

export const title = 'MCP SDK 1.32: client over streamable HTTP';
export const recipes = [
  { rule: 'upstream' },
  { rule: 'preserve', how: '`allowedHosts`', allowed: true },
  // A client in a page of the tunnel, and a server that lets in pages of its own.
  { rule: 'upstream', how: '`--origin upstream`, with Origin', flags: ['--origin', 'upstream'], page: true },
  { rule: 'preserve', how: '`allowedHosts`, `allowedOrigins`, with Origin', allowed: true, page: true },
];

export async function run(place) {
  const port = await freePort();
  const allowed = place.recipe.allowed ? [place.host] : [];
  const env = place.recipe.page && { ALLOWED_ORIGIN: place.recipe.allowed ? place.url : `http://localhost:${port}` };
  await place.app(port, process.execPath, [`${place.source}/server.mjs`, String(port), ...allowed], { env });
  await place.tunnel(String(port));
  const page = place.recipe.page ? [place.url] : [];
  const said = await place.run(process.execPath, ['--import', place.names, `${place.source}/client.mjs`, `${place.url}/mcp`, ...page]);
  assert.equal(said.trim(), 'add; 1/2 2/2; 5; ended');
  if (place.recipe.page) {
    const foreign = await place.curl('--include', '--json', '{}', '--header', 'Origin: http://evil.example', `${place.url}/mcp`);
    assert.match(foreign, /^HTTP\/1.1 403 .*Invalid Origin/s);
  }
}
