// Socket.IO with its WebSocket transport alone: text and 300 kB of binary there and back.
import { freePort } from '../../place.mjs';

export const title = 'Socket.IO 4.8: `transports: ["websocket"]`';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  await place.app(port, process.execPath, [`${place.source}/server.mjs`, String(port)]);
  await place.tunnel(String(port));
  const page = await place.page();
  await page.goto(place.url);
  await page.getByText('websocket: hello, 300000 bytes').waitFor();
}
