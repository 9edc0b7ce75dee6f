// Goes through the cases: each recipe under each domain. Prints how each went, and a table; the code says whether all passed.

import { readdirSync } from 'node:fs';
import path from 'node:path';
import { Edge, Place, here, openBrowser, stopAll } from './place.mjs';

const DOMAINS = ['localhost', 'example.test'];

const all = readdirSync(path.join(here, 'cases')).sort();
const named = process.argv.slice(2);
for (const name of named) {
  if (!all.includes(name)) {
    console.error(`there is no case ${name}; there are: ${all.join(' ')}`);
    process.exit(2);
  }
}

for (const signal of ['SIGINT', 'SIGTERM']) {
  process.on(signal, async () => {
    await stopAll();
    process.exit(1);
  });
}

const rows = [];
let failed = 0;
try {
  const edges = await Promise.all(DOMAINS.map((domain) => Edge.start(domain)));
  const browser = await openBrowser(DOMAINS[1]);
  for (const name of named.length ? named : all) {
    const one = await import(`./cases/${name}/case.mjs`);
    const lacks = await one.lacks?.();
    if (lacks) {
      console.log(`skipped  ${name}: ${lacks}`);
      rows.push([one.title, '', ...DOMAINS.map(() => `skipped: ${lacks}`)]);
      continue;
    }
    const shared = {};
    for (const recipe of one.recipes) {
      const results = [];
      for (const edge of edges) {
        const place = new Place(edge, browser, name, recipe, shared);
        const how = `${recipe.rule}${recipe.how ? ` + ${recipe.how}` : ''}`;
        const begun = Date.now();
        try {
          await one.run(place);
          place.checkSockets();
          results.push('ok');
        } catch (error) {
          failed += 1;
          results.push('FAIL');
          console.log(indented(error.stack ?? String(error)));
          console.log(indented(`application: ${place.application?.said.slice(-3000)}`));
          console.log(indented(`agent: ${place.agent?.said.slice(-2000)}`));
          console.log(indented(`browser: ${place.logs.slice(-20).join('\n')}`));
        } finally {
          await place.close();
        }
        const hints = place.hints.length ? `  (${place.hints.join('; ')})` : '';
        console.log(
          `${results.at(-1).padEnd(4)}  ${name}, ${how}, ${edge.domain}, ${((Date.now() - begun) / 1000).toFixed(1)} s${hints}`,
        );
      }
      rows.push([one.title, `${recipe.rule}${recipe.how ? ` + ${recipe.how}` : ''}`, ...results]);
    }
  }
  await browser.close();
} finally {
  await stopAll();
}

console.log(`\n| application | Host rule and settings | *.${DOMAINS[0]} | *.${DOMAINS[1]} |\n|---|---|---|---|`);
for (const row of rows) console.log(`| ${row.join(' | ')} |`);
process.exitCode = failed ? 1 : 0;

function indented(text) {
  return String(text).replace(/^/gm, '      ');
}
