// A page that Astro renders on demand, with a form that Astro guards by the page's origin.
import { writeFileSync } from 'node:fs';
import { formRecipes, freePort, script } from '../../place.mjs';

export const title = 'Astro 5.18 dev: a form';
export const recipes = formRecipes;

export async function run(place) {
  const port = await freePort();
  const server = place.server();
  writeFileSync(
    `${place.folder}/astro.config.mjs`,
    `import node from '@astrojs/node';
     export default { adapter: node({ mode: 'standalone' }), devToolbar: { enabled: false }, server: ${server} };`,
  );
  const env = { ASTRO_TELEMETRY_DISABLED: '1' };
  await place.app(port, script('astro'), ['dev', '--port', String(port)], { env });
  await place.tunnel(String(port));
  await place.form();
}
