// A page of webpack-dev-server's, and an edit of a module that shows without loading the page anew.
import { cpSync, writeFileSync } from 'node:fs';
import { freePort, mark, script, unmoved } from '../../place.mjs';

export const title = 'webpack-dev-server 6.1: page, HMR';
export const recipes = [
  { rule: 'upstream', how: '`client.webSocketURL`' },
  { rule: 'preserve', how: '`client.webSocketURL`, `allowedHosts`', allowed: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, place.folder, { recursive: true });
  const settings = {
    mode: 'development',
    entry: './main.js',
    devServer: {
      static: './public',
      // The client would dial the page's host with the server's own port.
      client: { webSocketURL: 'auto://0.0.0.0:0/ws' },
      allowedHosts: place.recipe.allowed ? [place.host] : undefined,
    },
  };
  writeFileSync(`${place.folder}/webpack.config.mjs`, `export default ${JSON.stringify(settings)};\n`);
  await place.app(port, script('webpack'), ['serve', '--port', String(port)]);
  await place.tunnel(String(port));

  const page = await place.page();
  const connected = page.waitForEvent('console', (message) => message.text().includes('[webpack-dev-server] connected'));
  await page.goto(place.url);
  await page.getByText('word: first').waitFor();
  await connected;
  await mark(page);
  writeFileSync(`${place.folder}/word.js`, "export const word = 'second';\n");
  await page.getByText('word: second').waitFor();
  await unmoved(page);
}
