// A client of the Model Context Protocol: initialise, list, call with progress over a stream, end.
import assert from 'node:assert/strict';
import { freePort } from '../../place.mjs';

export const title = 'MCP SDK 1.32: client over streamable HTTP';
export const recipes = [
  { rule: 'upstream' },
  { rule: 'preserve', how: '`allowedHosts`', allowed: true },
];

export async function run(place) {
  const port = await freePort();
  const allowed = place.recipe.allowed ? [place.host] : [];
  await place.app(port, process.execPath, [`${place.source}/server.mjs`, String(port), ...allowed]);
  await place.tunnel(String(port));
  const said = await place.run(process.execPath, ['--import', place.names, `${place.source}/client.mjs`, `${place.url}/mcp`]);
  assert.equal(said.trim(), 'add; 1/2 2/2; 5; ended');
}
