// A story of Storybook's, its channel, and an edit that shows.
import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { freePort, mark, script, unmoved, until } from '../../place.mjs';

export const title = 'Storybook 10.6: a story, its channel, HMR';
export const recipes = [
  { rule: 'upstream', how: '`hmr.clientPort`' },
  { rule: 'preserve', how: '`hmr.clientPort`, `core.allowedHosts`, `server.allowedHosts`', allowed: true },
];

export async function run(place) {
  const port = await freePort();
  cpSync(`${place.source}/app`, place.folder, { recursive: true });
  const allowed = place.recipe.allowed ? [place.host] : undefined;
  const settings = {
    framework: '@storybook/html-vite',
    stories: ['../*.stories.js'],
    core: { disableTelemetry: true, disableWhatsNewNotifications: true, allowedHosts: allowed },
  };
  mkdirSync(`${place.folder}/.storybook`);
  // The client of Vite would dial the page's host with Storybook's own port.
  const vite = `(config) => {
    config.server.hmr = { ...config.server.hmr, clientPort: ${place.edge.port} };
    config.server.allowedHosts = ${JSON.stringify(allowed)};
    return config;
  }`;
  const main = `${JSON.stringify(settings).slice(0, -1)}, viteFinal: ${vite} }`;
  writeFileSync(`${place.folder}/.storybook/main.js`, `export default ${main};\n`);
  await place.app(port, script('storybook'), ['dev', '--ci', '--no-version-updates', '--port', String(port)], {
    env: { STORYBOOK_DISABLE_TELEMETRY: '1' },
  });
  await place.tunnel(String(port));

  const page = await place.page();
  let heard = 0;
  page.on('websocket', (socket) => {
    if (socket.url().includes('storybook-server-channel')) socket.on('framereceived', () => (heard += 1));
  });
  await page.goto(`${place.url}/?path=/story/word--word`);
  const story = page.frameLocator('#storybook-preview-iframe');
  await story.getByText('word: first').waitFor();
  await until('the channel talks', () => heard > 0);
  await mark(page);
  const file = `${place.folder}/word.stories.js`;
  writeFileSync(file, readFileSync(file, 'utf8').replace('first', 'second'));
  await story.getByText('word: second').waitFor();
  await unmoved(page);
}
