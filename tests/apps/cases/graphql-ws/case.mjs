// A subscription of graphql-ws, which takes its subprotocol and is lost for good by one refused handshake.
import { freePort } from '../../place.mjs';

export const title = 'graphql-ws 6.4: subscription';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  await place.app(port, process.execPath, [`${place.source}/server.mjs`, String(port)]);
  await place.tunnel(String(port));
  const page = await place.page();
  await page.goto(place.url);
  await page.getByText('graphql-transport-ws: 1 2 3 complete').waitFor();
}
