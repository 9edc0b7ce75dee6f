// Next's development server: the page hydrates, which takes its WebSocket, and an edit shows with the state kept.
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { freePort, mark, script, unmoved, until } from '../../place.mjs';

export const title = 'Next.js 16.4 dev: hydration, fast refresh';
export const recipes = [
  { rule: 'upstream' },
  { rule: 'preserve', how: '`allowedDevOrigins`', allowed: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, `${place.folder}/app`, { recursive: true });
  const settings = { allowedDevOrigins: place.recipe.allowed ? [place.host] : undefined };
  writeFileSync(`${place.folder}/next.config.mjs`, `export default ${JSON.stringify(settings)};\n`);
  await place.app(port, script('next'), ['dev', '--port', String(port)], { env: { NEXT_TELEMETRY_DISABLED: '1' } });
  await place.tunnel(String(port));

  const page = await place.page();
  await page.goto(place.url);
  await mark(page);
  // The button does nothing until the page has hydrated.
  const button = page.getByRole('button', { name: /^count/ });
  await button.waitFor();
  for (const end = Date.now() + 30_000; (await button.textContent()) === 'count 0'; ) {
    if (Date.now() > end) throw new Error('the page does not hydrate');
    await button.click();
  }
  const count = await button.textContent();
  const file = `${place.folder}/app/page.js`;
  const edited = readFileSync(file, 'utf8').replace('first', 'second');
  // Turbopack does not see an edit that follows its first page at once, without a tunnel neither: it is saved again.
  let saved = 0;
  await until('the edit shows', async () => {
    if (Date.now() - saved > 5000) {
      writeFileSync(file, edited);
      saved = Date.now();
    }
    return page.getByText('word: second').isVisible();
  });
  await page.getByRole('button', { name: count }).waitFor();
  await unmoved(page);
}
