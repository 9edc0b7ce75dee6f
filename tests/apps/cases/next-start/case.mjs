// A built Next.js app: a form whose Server Action Next guards by the page's origin.
import { cpSync } from 'node:fs';
import { freePort, script } from '../../place.mjs';

export const title = 'Next.js 16.4 start: Server Action';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

const env = { NEXT_TELEMETRY_DISABLED: '1' };

export async function run(place) {
  if (!place.shared.built) {
    place.shared.built = place.folder;
    cpSync(`${place.source}/app`, `${place.folder}/app`, { recursive: true });
    await place.run(script('next'), ['build'], { env });
  }
  const port = await freePort();
  await place.app(port, script('next'), ['start', '--port', String(port)], { env, cwd: place.shared.built });
  await place.tunnel(String(port));

  const page = await place.page();
  await page.goto(place.url);
  await page.getByRole('button', { name: 'count 0' }).click();
  await page.getByRole('button', { name: 'count 1' }).waitFor();
  await page.getByLabel('word').fill('hello');
  await page.getByRole('button', { name: 'save' }).click();
  await page.getByText('saved: hello').waitFor();
  if (page.url() !== `${place.url}/saved?word=hello`) throw new Error(`the action led to ${page.url()}`);
}
