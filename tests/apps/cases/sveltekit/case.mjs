// A form action of SvelteKit, which guards it by the page's origin.
import { writeFileSync } from 'node:fs';
import { formRecipes, freePort, script } from '../../place.mjs';

export const title = 'SvelteKit 2.70 dev: a form action';
export const recipes = formRecipes;

export async function run(place) {
  const port = await freePort();
  const server = place.server();
  writeFileSync(`${place.folder}/package.json`, '{ "type": "module" }');
  writeFileSync(
    `${place.folder}/vite.config.js`,
    `import { sveltekit } from '@sveltejs/kit/vite';
     export default { plugins: [sveltekit()], server: ${server} };`,
  );
  await place.app(port, script('vite'), ['dev', '--port', String(port), '--strictPort']);
  await place.tunnel(String(port));
  await place.form();
}
