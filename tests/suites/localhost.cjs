// Every name under localhost is this machine (RFC 6761, section 6.3); not every resolver knows.
const dns = require('dns')
const { lookup } = dns
dns.lookup = (host, options, done) => lookup(host.endsWith('.localhost') ? '127.0.0.1' : host, options, done)
