'use strict';

// The state machines' files as text: as objects, osls would leave every `null` out of them.

const fs = require('node:fs');
const path = require('node:path');

const text = (name) => fs.readFileSync(path.join(__dirname, '..', 'statemachines', `${name}.asl.json`), 'utf8');

module.exports = () => ({ publicRequest: text('public_request'), delivery: text('delivery') });
