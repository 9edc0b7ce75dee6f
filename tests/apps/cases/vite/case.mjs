// A page of Vite's, and an edit of a module that shows without loading the page anew.
import { cpSync, writeFileSync } from 'node:fs';
import { freePort, mark, script, unmoved } from '../../place.mjs';

export const title = 'Vite 8.4 dev: page, HMR';
export const recipes = [
  { rule: 'upstream' },
  { rule: 'preserve', how: '`server.allowedHosts`', settings: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, place.folder, { recursive: true });
  const allowed = place.recipe.settings ? [place.host] : undefined;
  writeFileSync(`${place.folder}/vite.config.js`, `export default ${JSON.stringify({ server: { allowedHosts: allowed } })};`);
  await place.app(port, script('vite'), ['--port', port, '--strictPort']);
  await place.tunnel(String(port));

  const page = await place.page();
  const connected = page.waitForEvent('console', (message) => message.text().includes('[vite] connected'));
  await page.goto(place.url);
  await page.getByText('word: first').waitFor();
  await connected;
  await mark(page);
  writeFileSync(`${place.folder}/word.js`, "export const word = 'second';\n");
  await page.getByText('word: second').waitFor();
  await unmoved(page);
}
