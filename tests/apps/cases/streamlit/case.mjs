// A slider of Streamlit's that moves a chart; everything goes over its WebSocket, in binary.
import { freePort, until, venv } from '../../place.mjs';

export const title = 'Streamlit 1.67: a slider moves its chart';
export const recipes = [{ rule: 'upstream' }, { rule: 'preserve' }];

export async function run(place) {
  const port = await freePort();
  await place.app(port, venv('streamlit'), [
    ...['run', `${place.source}/app.py`, '--server.port', String(port), '--server.address', '127.0.0.1'],
    ...['--server.headless', 'true', '--browser.gatherUsageStats', 'false'],
  ], { env: { HOME: place.folder } });
  await place.tunnel(String(port));

  const page = await place.page();
  await page.goto(place.url);
  await page.getByText('rows: 5').waitFor();
  const chart = page.getByTestId('stVegaLiteChart');
  await chart.waitFor();
  const bars = () => chart.locator('canvas, svg').first().screenshot();
  // As long as it is being drawn, two pictures differ.
  let before = await bars();
  await until('the chart stands still', async () => {
    const last = before;
    before = await bars();
    return before.equals(last);
  });
  await page.getByRole('slider').press('ArrowRight');
  await page.getByText('rows: 6').waitFor();
  await until('the chart has moved', async () => !(await bars()).equals(before));
}
