// Loaded into every process of node that runs the app: writes down each host that is not this machine, and refuses it.
const { appendFileSync } = require('node:fs');
const { Socket } = require('node:net');

const LOCAL = [undefined, '', 'localhost', '127.0.0.1', '::1', '0.0.0.0', '::'];
const { connect } = Socket.prototype;
const { fetch } = globalThis;

function refuse(host) {
  appendFileSync(process.env.STRANGERS_LOG, `${host}\n`);
  throw new Error(`${host} is not this machine`);
}

Socket.prototype.connect = function (...given) {
  const [options] = Array.isArray(given[0]) ? given[0] : given;
  if (typeof options === 'object' && !options.path && !LOCAL.includes(options.host)) refuse(options.host);
  return connect.apply(this, given);
};

// What asks for a name never comes to connect where names are not answered.
globalThis.fetch = (input, init) => {
  const host = new URL(input.url ?? input).hostname.replace(/^\[|\]$/g, '');
  return LOCAL.includes(host) ? fetch(input, init) : refuse(host);
};
