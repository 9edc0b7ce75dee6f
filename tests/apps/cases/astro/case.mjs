// A page that Astro renders on demand, with a form that Astro guards by the page's origin.
import { cpSync, writeFileSync } from 'node:fs';
import { freePort, script } from '../../place.mjs';

export const title = 'Astro 5.18 dev: a form';
export const recipes = [
  { rule: 'upstream', how: '`--origin upstream`', flags: ['--origin', 'upstream'] },
  { rule: 'preserve', how: '`server.allowedHosts`', settings: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, place.folder, { recursive: true });
  const server = place.recipe.settings ? { allowedHosts: [place.host] } : {};
  writeFileSync(
    `${place.folder}/astro.config.mjs`,
    `import node from '@astrojs/node';
     export default { adapter: node({ mode: 'standalone' }), devToolbar: { enabled: false }, server: ${JSON.stringify(server)} };`,
  );
  const env = { ASTRO_TELEMETRY_DISABLED: '1' };
  await place.app(port, script('astro'), ['dev', '--port', String(port)], { env });
  await place.tunnel(String(port));
  await place.form();
}
