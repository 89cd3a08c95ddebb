// Loaded before everything else (node --import). Whoever tries to reach anything
// but this machine's loopback is refused and noted, and the process ends with
// REFUSED: also when the caller swallows the error. A process that reached
// nothing at all ends with SILENT, because then the guard has guarded nothing.
import dgram from 'node:dgram';
import dns from 'node:dns';
import { syncBuiltinESMExports } from 'node:module';
import net from 'node:net';

const REFUSED = 97;
const SILENT = 98;

const loopback = new net.BlockList();
loopback.addSubnet('127.0.0.0', 8, 'ipv4');
loopback.addAddress('::1', 'ipv6');

const refused = [];
let connections = 0;

function isHere(host) {
  const family = net.isIP(host);
  return host === 'localhost' || (family !== 0 && loopback.check(host, family === 6 ? 'ipv6' : 'ipv4'));
}

function refuse(what) {
  refused.push(what);
  return Object.assign(new Error(`guard: ${what} is not loopback`), { code: 'EACCES' });
}

// Socket.connect takes (port, host), (path), (options), or from net.connect an
// array [options, callback].
function destination(args) {
  const first = Array.isArray(args[0]) ? args[0][0] : args[0];
  if (typeof first === 'object' && first !== null) return first;
  const port = Number(first);
  if (Number.isNaN(port)) return { path: first };
  return { port, host: typeof args[1] === 'string' ? args[1] : 'localhost' };
}

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function guarded(...args) {
  const to = destination(args);
  const host = to.host ?? 'localhost';
  if (to.path || isHere(host)) {
    connections += 1;
    return connect.apply(this, args);
  }
  const error = refuse(`a connection to ${host}:${to.port}`);
  process.nextTick(() => this.destroy(error));
  return this;
};

for (const method of ['send', 'connect']) {
  dgram.Socket.prototype[method] = () => {
    throw refuse('a datagram');
  };
}

for (const api of [dns, dns.promises]) {
  for (const method of Object.keys(api)) {
    if (!/^(lookup|resolve|reverse)/.test(method) || typeof api[method] !== 'function') continue;
    const ask = api[method];
    api[method] = (name, ...rest) => {
      if (method === 'lookup' && isHere(name)) return ask.call(api, name, ...rest);
      throw refuse(`the name ${name}`);
    };
  }
}
syncBuiltinESMExports();

process.on('exit', () => {
  if (refused.length > 0) {
    console.error(`guard: refused ${refused.join(', ')}`);
    process.exitCode = REFUSED;
  } else if (connections === 0) {
    console.error('guard: no connection was made');
    process.exitCode = SILENT;
  }
});
