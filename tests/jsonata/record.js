// Evaluates every expression of expressions.txt, and of the state machines, with npm's jsonata, the engine that Step
// Functions names, and writes what it gives, one line each.
'use strict';
const fs = require('fs');
const path = require('path');
const jsonata = require(process.argv[2]);
const here = __dirname;
const scope = JSON.parse(fs.readFileSync(path.join(here, 'scope.json'), 'utf8'));
const machines = path.join(here, '../../statemachines');
const found = new Set(fs.readFileSync(path.join(here, 'expressions.txt'), 'utf8').split('\n').filter(Boolean));
const collect = (value) => {
  if (typeof value === 'string') {
    const inside = /^\{%([\s\S]*)%\}$/.exec(value);
    if (inside) found.add(inside[1].trim());
  } else if (value && typeof value === 'object') Object.values(value).forEach(collect);
};
for (const file of fs.readdirSync(machines).filter((name) => name.endsWith('.asl.json')).sort()) {
  collect(JSON.parse(fs.readFileSync(path.join(machines, file), 'utf8')));
}
(async () => {
  const lines = [];
  for (const source of found) {
    let outcome;
    try {
      const compiled = jsonata(source);
      compiled.registerFunction('millis', () => 1790000000000, '<:n>');
      const value = await compiled.evaluate(undefined, { states: scope.states, ...scope.variables });
      outcome = value === undefined ? { undefined: true } : { value: JSON.parse(JSON.stringify(value)) };
    } catch (error) {
      outcome = { error: error.code || String(error) };
    }
    lines.push(JSON.stringify({ source, ...outcome }));
  }
  fs.writeFileSync(process.argv[3], lines.join('\n') + '\n');
})();
