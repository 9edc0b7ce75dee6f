'use strict';

// The state machine's file as text: as an object, osls would leave every `null` out of it.

const fs = require('node:fs');
const path = require('node:path');

module.exports = () =>
  fs.readFileSync(path.join(__dirname, '..', 'statemachines', 'public_request.asl.json'), 'utf8');
