// `node --import` of this: every name is this machine. Clients in Node.js have no flag for it.
import dns from 'node:dns';

dns.lookup = (_name, options, callback) => {
  const answer = callback ?? options;
  if (options?.all) answer(null, [{ address: '127.0.0.1', family: 4 }]);
  else answer(null, '127.0.0.1', 4);
};
