// Runs pieces of code that a host sends, one after the other, in one global scope.
//
// Requests come on descriptor 0, each up to a NUL: "c" and code, or "s" and fresh random bytes in hexadecimal. Answers go to
// descriptor 3: a line of kind, length and number of bytes cut off, then text of that length. Programs that the code starts have
// neither descriptor.
'use strict';
(() => {
  const fs = require('fs');
  const net = require('net');
  const vm = require('vm');
  const util = require('util');
  const crypto = require('crypto');

  const MOST = 1 << 20; // bytes of text in an answer

  // Opened anew, they are closed when a program starts.
  const requests = new net.Socket({ fd: fs.openSync('/proc/self/fd/0', 'r'), readable: true, writable: false });
  const results = fs.openSync('/proc/self/fd/3', 'w');
  fs.closeSync(3);
  fs.closeSync(0);
  fs.openSync('/dev/null', 'r');

  const hooks = [];
  globalThis.hearth = { onClone: (hook) => void hooks.push(hook) }; // called in each clone, before code runs there
  globalThis.require = require;

  // The engine's own generator cannot be seeded again: this one (xoshiro128**) takes its place.
  const state = new Uint32Array(4);
  const rotated = (word, by) => (word << by) | (word >>> (32 - by));
  const word = () => {
    const result = Math.imul(rotated(Math.imul(state[1], 5), 7), 9) >>> 0;
    const shifted = state[1] << 9;
    state[2] ^= state[0];
    state[3] ^= state[1];
    state[1] ^= state[2];
    state[0] ^= state[3];
    state[2] ^= shifted;
    state[3] = rotated(state[3], 11);
    return result;
  };
  Math.random = () => ((word() >>> 5) * 67108864 + (word() >>> 6)) / 9007199254740992;
  const seed = (bytes) => {
    for (let at = 0; at < 4; at++) state[at] = bytes.readUInt32LE(4 * at) | (at === 0);
  };
  seed(crypto.randomBytes(16));

  // Node keeps random bytes in stock for these two: clones would share the stock.
  const randomUUID = crypto.randomUUID;
  crypto.randomUUID = () => randomUUID({ disableEntropyCache: true });
  Object.getPrototypeOf(crypto.webcrypto).randomUUID = () => randomUUID({ disableEntropyCache: true });
  const drawn = (low, high) => {
    const range = high - low;
    if (!(Number.isSafeInteger(low) && Number.isSafeInteger(high) && range > 0 && range <= 2 ** 48)) {
      throw new RangeError('randomInt takes safe integers, the smaller first, less than 2 ** 48 apart');
    }
    const most = 2 ** 48 - (2 ** 48 % range);
    for (;;) {
      const number = crypto.randomBytes(6).readUIntBE(0, 6);
      if (number < most) return low + (number % range);
    }
  };
  crypto.randomInt = (...bounds) => {
    const callback = typeof bounds[bounds.length - 1] === 'function' ? bounds.pop() : null;
    const [low, high] = bounds.length < 2 ? [0, bounds[0]] : bounds;
    if (callback === null) return drawn(low, high);
    const number = drawn(low, high);
    process.nextTick(callback, null, number);
  };

  const answer = (kind, text = '') => {
    const body = Buffer.from(text);
    const kept = body.subarray(0, MOST);
    let rest = Buffer.concat([Buffer.from(`${kind} ${kept.length} ${body.length - kept.length}\n`), kept]);
    while (rest.length > 0) rest = rest.subarray(fs.writeSync(results, rest));
  };

  const described = (error) => {
    if (!(error instanceof Error) || typeof error.stack !== 'string') return `${util.inspect(error)}\n`;
    const ours = /^ +at .*(\[eval\]|node:)/;
    return `${error.stack.split('\n').filter((line) => !ours.test(line)).join('\n')}\n`;
  };

  const importModuleDynamically = vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER ?? ((name) => import(name));
  const compiled = (code, filename) => {
    const options = { filename, importModuleDynamically };
    try {
      return new vm.Script(code, options);
    } catch (error) {
      if (!(error instanceof SyntaxError && /\bawait\b/.test(code))) throw error;
      const wrapped = [`(async () => (${code}\n))()`, `(async () => {${code}\n})()`];
      for (const code of wrapped) {
        try {
          return new vm.Script(code, options);
        } catch {
          // The next, or the first error.
        }
      }
      throw error;
    }
  };

  let interrupt = null; // ends the wait for what code promised
  process.on('SIGINT', () => interrupt?.(new Error('Interrupted')));
  process.on('uncaughtException', (error) => process.stderr.write(described(error)));

  const call = async (code, name) => {
    try {
      let value = compiled(code, name).runInThisContext({ breakOnSigint: true });
      if (typeof value?.then === 'function') {
        const interrupted = new Promise((_, reject) => {
          interrupt = reject;
        });
        value = await Promise.race([value, interrupted]);
      }
      if (value === undefined) return ['n'];
      globalThis._ = value;
      return ['v', util.inspect(value)];
    } catch (error) {
      return ['e', described(error)];
    } finally {
      interrupt = null;
    }
  };

  // What is printed may be on its way to a pipe that is full.
  const flushed = (output) =>
    output.writableLength > 0 && !output.destroyed ? new Promise((done) => output.write('', done)) : null;

  let number = 0;
  const serve = async (kind, body) => {
    if (kind === 's') {
      try {
        seed(Buffer.from(body, 'hex'));
        for (const hook of hooks) hook();
        answer('n');
      } catch (error) {
        answer('e', described(error));
      }
      return;
    }
    number += 1;
    const end = await call(body, `call-${number}`);
    await flushed(process.stdout);
    await flushed(process.stderr);
    answer(...end);
    try {
      fs.fstatSync(1);
      fs.fstatSync(2);
    } catch {
      process.exit(70); // closed by the code: whoever comes next gets a new interpreter
    }
  };

  let pending = [];
  let turn = Promise.resolve();
  requests.on('data', (chunk) => {
    for (let end; (end = chunk.indexOf(0)) >= 0; chunk = chunk.subarray(end + 1)) {
      const message = Buffer.concat([...pending, chunk.subarray(0, end)]).toString();
      pending = [];
      turn = turn.then(() => serve(message[0], message.slice(1)));
    }
    if (chunk.length > 0) pending.push(chunk);
  });
  requests.on('end', () => process.exit(0));
  answer('n');
})();
