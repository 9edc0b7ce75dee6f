// Jupyter's login form, which it guards by the page's origin, and a cell that runs in a kernel, over a WebSocket
// with binary messages.
import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { freePort, until, venv } from '../../place.mjs';

export const title = 'JupyterLab 4.6: login by password, a cell runs';
export const recipes = [
  { rule: 'upstream', how: '`--origin upstream`', flags: ['--origin', 'upstream'] },
  { rule: 'preserve', how: '`allow_remote_access`', settings: ['--ServerApp.allow_remote_access=True'] },
];

const WORD = 'a-word';

export async function run(place) {
  const port = await freePort();
  place.shared.hash ??= await place.run(venv('python'), [
    ...['-c', `from jupyter_server.auth import passwd; print(passwd('${WORD}'), end='')`],
  ]);
  const cell = { cell_type: 'code', id: 'one', source: 'print(6 * 7)', metadata: {}, outputs: [], execution_count: null };
  const kernel = { name: 'python3', display_name: 'Python 3', language: 'python' };
  const notebook = { cells: [cell], metadata: { kernelspec: kernel }, nbformat: 4, nbformat_minor: 5 };
  writeFileSync(`${place.folder}/one.ipynb`, JSON.stringify(notebook));
  // Nothing of the user's own settings, and no news from outside.
  const home = { HOME: place.folder, JUPYTER_CONFIG_DIR: place.folder, JUPYTER_PLATFORM_DIRS: '1' };
  await place.app(port, venv('jupyter'), [
    ...['lab', '--no-browser', '--allow-root', `--port=${port}`, `--ServerApp.root_dir=${place.folder}`],
    ...[`--PasswordIdentityProvider.hashed_password=${place.shared.hash}`, '--LabApp.news_url=None'],
    ...['--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate', ...(place.recipe.settings ?? [])],
  ], { env: home });
  await place.tunnel(String(port));

  const page = await place.page();
  let binary = 0;
  page.on('websocket', (socket) => {
    if (!/\/channels\?/.test(socket.url())) return;
    socket.on('framereceived', ({ payload }) => (binary += Buffer.isBuffer(payload) ? 1 : 0));
  });
  await page.goto(`${place.url}/login?next=%2Flab%2Ftree%2Fone.ipynb`);
  await page.locator('input[name=password]').fill(WORD);
  await page.keyboard.press('Enter');
  const editor = page.locator('.jp-CodeCell .cm-content').first();
  await editor.waitFor();
  await until('the kernel talks', () => binary > 0);
  await editor.click();
  await page.keyboard.press('Shift+Enter');
  await page.locator('.jp-OutputArea-output').getByText('42').waitFor();
  assert.ok(binary > 0);
}
