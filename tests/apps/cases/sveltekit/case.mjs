// A form action of SvelteKit, which guards it by the page's origin.
import { cpSync, writeFileSync } from 'node:fs';
import { freePort, script } from '../../place.mjs';

export const title = 'SvelteKit 2.70 dev: a form action';
export const recipes = [
  { rule: 'upstream', how: '`--origin upstream`', flags: ['--origin', 'upstream'] },
  { rule: 'preserve', how: '`server.allowedHosts`', settings: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, place.folder, { recursive: true });
  const server = place.recipe.settings ? { allowedHosts: [place.host] } : {};
  writeFileSync(`${place.folder}/package.json`, '{ "type": "module" }');
  writeFileSync(
    `${place.folder}/vite.config.js`,
    `import { sveltekit } from '@sveltejs/kit/vite';
     export default { plugins: [sveltekit()], server: ${JSON.stringify(server)} };`,
  );
  await place.app(port, script('vite'), ['dev', '--port', String(port), '--strictPort']);
  await place.tunnel(String(port));
  await place.form();
}
