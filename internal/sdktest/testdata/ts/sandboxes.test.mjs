// Sandboxes: their life, their processes, their files, and what they must not do.
import assert from 'node:assert/strict';
import { after, before, describe, it } from 'node:test';
import { SandboxInstance } from '@blaxel/core';
import { box, end, names, refused, region, request, sandboxName, sh, thrown, until } from './kit.mjs';

describe('the life of a sandbox', () => {
  it('goes from nothing by DEPLOYED and DELETING to nothing', async () => {
    const name = sandboxName('life');
    await refused(SandboxInstance.get(name), 404);
    const instance = await box({ name, labels: { env: 'test' }, envs: [{ name: 'GREETING', value: 'hello there' }], ports: [{ target: 8080 }] });
    assert.equal(instance.metadata.name, name);
    assert.equal(instance.status, 'DEPLOYED');
    assert.equal(instance.spec.region, region);
    assert.equal(instance.spec.runtime.image, 'blaxel/base-image:latest', 'what the SDK asks for');
    assert.equal(instance.spec.runtime.memory, 512);
    assert.ok(instance.metadata.url.startsWith('http://127.0.0.1:'), instance.metadata.url);
    assert.equal((await sh(instance, 'echo $GREETING; printenv GREETING; printenv NONE || echo none')).stdout, 'hello there\nhello there\nnone\n');
    assert.deepEqual((await SandboxInstance.get(name)).metadata, instance.metadata);
    await end(instance);
    await refused(SandboxInstance.delete(name), 404);
    await refused(SandboxInstance.get(name), 404);
  });

  it('the server names one that has no name', async () => {
    const instance = await box({ name: undefined });
    assert.match(instance.metadata.name, /^sandbox-[0-9a-f]{8}$/);
    await sh(instance, 'true');
  });

  it('is listed, found by external id, and changed', async () => {
    const instance = await box({ externalId: 'session-1', labels: { mark: 'listed-here' } });
    const { name } = instance.metadata;
    const page = await SandboxInstance.list({ q: 'listed-here' });
    assert.deepEqual(page.data.map((s) => s.metadata.name), [name]);
    assert.equal((await SandboxInstance.getByExternalId('session-1')).metadata.name, name);
    const changed = await SandboxInstance.updateMetadata(name, { labels: { mark: 'changed' }, externalId: 'session-2' });
    assert.deepEqual(changed.metadata.labels, { mark: 'changed' });
    await refused(SandboxInstance.getByExternalId('session-1'), 404);
    assert.equal((await SandboxInstance.getByExternalId('session-2')).metadata.name, name);
    for (const externalId of ['x'.repeat(65), 'has spaces!']) await refused(SandboxInstance.updateMetadata(name, { externalId }), 400);
    await sh(instance, 'true');
  });

  it('pages', async () => {
    for (const label of ['p1', 'p2', 'p3']) await box({ labels: { pages: label }, memory: 64 });
    const seen = [];
    let page = await SandboxInstance.list({ q: 'pages', limit: 2, sort: 'createdAt:asc' });
    assert.equal(page.data.length, 2);
    for (;;) {
      seen.push(...page.data.map((s) => s.metadata.labels.pages));
      if (!page.meta.hasMore) break;
      page = await page.nextPage();
    }
    assert.deepEqual(seen, ['p1', 'p2', 'p3']);
  });

  it('called for by many at once is made once', async () => {
    const name = sandboxName('race');
    const all = await Promise.all(Array.from({ length: 5 }, () => SandboxInstance.createIfNotExists({ name, region, memory: 64 })));
    assert.equal(new Set(all.map((s) => s.metadata.createdAt)).size, 1);
  });

  it('whose first process ends has failed, and makes room for another of its name', async () => {
    const instance = await box();
    await instance.process.exec({ command: 'kill -TERM 1', waitForCompletion: true }).catch(() => {});
    const { name } = instance.metadata;
    await until('the sandbox has failed', 30, async () => (await SandboxInstance.get(name)).status === 'FAILED');
    const error = await thrown(instance.process.exec({ command: 'true', waitForCompletion: true }));
    assert.equal(error.status, 409);
    const again = await SandboxInstance.createIfNotExists({ name, region });
    assert.notEqual(again.metadata.createdAt, instance.metadata.createdAt);
    await sh(again, 'true');
  });

  for (const [what, config] of [
    ['an odd name', { name: 'Not A Name' }], ['too little memory', { memory: 1 }], ['an odd image', { image: 'a b' }],
    ['an odd variable', { envs: [{ name: 'A=B', value: '' }] }], ['an impossible port', { ports: [{ target: 70000 }] }],
  ]) {
    it(`with ${what} is refused`, async () => {
      const error = await thrown(SandboxInstance.create({ name: sandboxName(), region, ...config }));
      assert.equal(error.code, 'INVALID_REQUEST');
      assert.equal(error.status_code, 400);
    });
  }
});

describe('in a sandbox', () => {
  let instance;
  before(async () => { instance = await box({ memory: 256 }); });
  after(() => end(instance));

  it('a process has its output, its code and its place', async () => {
    const done = await instance.process.exec({
      name: 'first', command: 'echo out; echo err >&2; pwd; echo $COLOUR; exit 7', workingDir: '/tmp', env: { COLOUR: 'blue' }, waitForCompletion: true,
    });
    assert.equal(done.name, 'first');
    assert.equal(done.status, 'failed');
    assert.equal(done.exitCode, 7);
    assert.equal(done.stdout, 'out\n/tmp\nblue\n');
    assert.equal(done.stderr, 'err\n');
    for (const line of ['out', 'err', '/tmp', 'blue']) assert.ok(done.logs.split('\n').includes(line), done.logs);
    assert.equal(done.workingDir, '/tmp');
    assert.ok(Date.parse(done.startedAt) <= Date.parse(done.completedAt), `${done.startedAt}, ${done.completedAt}`);
    assert.equal((await instance.process.get('first')).pid, done.pid);
    assert.equal((await instance.process.get(done.pid)).exitCode, 7);
    assert.equal(await instance.process.logs('first', 'stdout'), 'out\n/tmp\nblue\n');
    assert.ok((await instance.process.list()).some((p) => p.name === 'first'));
  });

  it('a process runs on, is waited for, stopped and killed', async () => {
    const started = await instance.process.exec({ name: 'slow', command: 'echo begun; sleep 0.3; echo over' });
    assert.equal(started.status, 'running');
    assert.equal((await thrown(instance.process.exec({ name: 'slow', command: 'true' }))).status, 409);
    const done = await instance.process.wait(started.pid, { interval: 50 });
    assert.equal(done.status, 'completed');
    assert.equal(done.stdout, 'begun\nover\n');
    const loop = 'while :; do sleep 0.0625; done';
    await instance.process.exec({ name: 'stopped', command: loop });
    await instance.process.stop('stopped');
    await until('it has stopped', 10, async () => (await instance.process.get('stopped')).status === 'stopped');
    await instance.process.exec({ name: 'killed', command: `trap '' TERM; ${loop}` });
    await instance.process.kill('killed');
    assert.equal((await instance.process.get('killed')).status, 'killed');
    await until('nothing of them is left', 10, async () => !(await sh(instance, 'ps')).stdout.includes('0.0625'));
  });

  it('a process is killed with its children when its time is up', async () => {
    const done = await instance.process.exec({ command: 'sleep 1234 & sleep 1235', timeout: 1, waitForCompletion: true });
    assert.equal(done.status, 'killed');
    await until('its children are gone', 10, async () => !(await sh(instance, 'ps')).stdout.includes('sleep 123'));
  });

  it('output comes by callback, and as it is written', async () => {
    const lines = [];
    await instance.process.exec({ command: 'echo a; echo b >&2', waitForCompletion: true, onLog: (line) => lines.push(line) });
    assert.deepEqual(lines.sort(), ['a', 'b']);
    const [out, err] = [[], []];
    await instance.process.exec({ name: 'talks', command: 'for i in 1 2 3; do echo $i; sleep 0.05; done; echo end >&2' });
    const stream = instance.process.streamLogs('talks', { onStdout: (line) => out.push(line), onStderr: (line) => err.push(line) });
    await stream.wait();
    assert.deepEqual(out, ['1', '2', '3']);
    assert.deepEqual(err, ['end']);
  });

  it('input goes to a process that wants some', async () => {
    const started = await instance.process.exec({ name: 'reader', command: 'cat', stdin: true });
    await instance.process.writeStdin(started.pid, 'first\n');
    await instance.process.writeStdin(started.pid, 'second\n');
    await instance.process.closeStdin(started.pid);
    const done = await instance.process.wait(started.pid, { interval: 50 });
    assert.equal(done.stdout, 'first\nsecond\n');
    const quiet = await instance.process.exec({ name: 'quiet', command: 'exec >/tmp/quiet 2>&1; cat', stdin: true });
    await instance.process.writeStdin(quiet.pid, 'heard\n');
    await instance.process.closeStdin(quiet.pid);
    await instance.process.wait(quiet.pid, { interval: 50 });
    assert.equal((await sh(instance, 'cat /tmp/quiet')).stdout, 'heard\n', 'also where nobody listens to its output');
  });

  it('a process that says too much goes on, and the beginning is kept', async () => {
    const done = await sh(instance, 'echo begin; dd if=/dev/zero bs=1M count=8 2>/dev/null | tr "\\0" x; echo; echo end >&2');
    assert.ok(done.stdout.startsWith('begin\nxxx') && done.stdout.length <= 1 << 20, `${done.stdout.length} bytes`);
    assert.equal(done.truncated, true);
  });

  it('files are written, read, listed, copied and removed', async () => {
    const text = 'line one\nline two with "quotes", $dollars and ünïcode 🚀\n';
    await instance.fs.mkdir('/work/dir');
    await instance.fs.write('/work/dir/a file.txt', text);
    assert.equal(await instance.fs.read('/work/dir/a file.txt'), text);
    assert.equal((await sh(instance, 'cat "/work/dir/a file.txt"')).stdout, text);
    await instance.fs.write('/work/made/on/the/way.txt', '');
    assert.equal(await instance.fs.read('/work/made/on/the/way.txt'), '');
    await sh(instance, "touch '/work/-dash' '/work/new\nline' /work/.hidden; ln -s /etc/passwd /work/link");
    const list = await instance.fs.ls('/work');
    assert.deepEqual(list.subdirectories.map((d) => d.name).sort(), ['dir', 'made']);
    assert.deepEqual(list.files.map((f) => f.name).sort(), ['-dash', '.hidden', 'link', 'new\nline']);
    const { files: [file] } = await instance.fs.ls('/work/dir');
    assert.equal(file.path, '/work/dir/a file.txt');
    assert.equal(file.size, Buffer.byteLength(text));
    assert.equal(file.owner, 'root');
    await instance.fs.cp('/work/dir', '/work/copy');
    assert.equal(await instance.fs.read('/work/copy/a file.txt'), text);
    assert.equal((await thrown(instance.fs.rm('/work/copy'))).status, 409, 'it is not empty');
    await instance.fs.rm('/work/copy', true);
    for (const ask of ['read', 'ls', 'rm']) assert.equal((await thrown(instance.fs[ask]('/work/copy'))).status, 404);
    await instance.fs.writeTree([{ path: 'x/one', content: '1' }, { path: 'two', content: '2' }], '/work/tree');
    assert.equal(await instance.fs.read('/work/tree/x/one'), '1');
    assert.equal((await thrown(instance.fs.read('/dev/zero'))).status, 409, 'a device has no end');
  });

  it('bytes arrive as they are, small and in parts', async () => {
    const bytes = Buffer.from(Array.from({ length: 256 }, (_, i) => i));
    await instance.fs.writeBinary('/tmp/bytes', bytes);
    assert.deepEqual(Buffer.from(await (await instance.fs.readBinary('/tmp/bytes')).arrayBuffer()), bytes);
    const large = Buffer.alloc(11 << 20, 'holdfast ');
    await instance.fs.writeBinary('/tmp/large', large);
    assert.ok(Buffer.from(await (await instance.fs.readBinary('/tmp/large')).arrayBuffer()).equals(large), 'eleven MiB');
    assert.equal((await sh(instance, 'ls -A /tmp | grep upload', 1)).stdout, '', 'no part is left');
  });

  it('what is not offered says so', async () => {
    const { status, response, error } = await thrown(instance.fs.grep('x', '/'));
    assert.equal(status ?? response.status, 404);
    assert.ok(error.message.includes('do not have this'), JSON.stringify(error));
  });

  it('there is no network but loopback, and little else of the host', async () => {
    const { stdout } = await sh(instance, 'cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d " "');
    assert.equal(stdout, 'lo\n');
    const status = (await sh(instance, 'cat /proc/self/status')).stdout;
    assert.match(status, /^NoNewPrivs:\t1$/m);
    assert.match(status, /^Seccomp:\t2$/m);
    assert.match(status, /^CapEff:\t0{8}/m);
    assert.match((await sh(instance, 'cat /proc/self/uid_map')).stdout, /^\s+0\s+\d{7,}\s+65536$/m, 'root here is nobody there');
    for (const command of ['mount -t tmpfs x /mnt', 'unshare -U true', 'dmesg', 'mknod /tmp/d b 7 0', 'echo 1 > /proc/sys/kernel/panic', 'cat /proc/kcore']) {
      const { exitCode } = await instance.process.exec({ command, waitForCompletion: true });
      assert.notEqual(exitCode, 0, command);
    }
  });

  it('memory, processes and the root filesystem have a limit, and the sandbox lives on', async () => {
    const eats = await instance.process.exec({ command: 'dd if=/dev/zero of=/dev/null bs=400M count=1', waitForCompletion: true });
    assert.notEqual(eats.exitCode, 0, 'more memory than there is');
    await sh(instance, 'true');
    const fills = await instance.process.exec({ command: 'dd if=/dev/zero of=/fill bs=1M count=600', waitForCompletion: true });
    assert.match(fills.logs, /No space left on device/);
    await sh(instance, 'rm -f /fill');
    const forks = await instance.process.exec({ command: 'for i in $(seq 300); do sleep 3 & done', waitForCompletion: true });
    assert.notEqual(forks.exitCode, 0);
    assert.match(forks.logs, /can't fork|Resource temporarily unavailable/);
    await sh(instance, 'true');
  });
});

describe('foreign eyes', () => {
  it('see neither the sandbox nor what is in it', async () => {
    const instance = await box();
    const other = `ws-${instance.metadata.name.slice(4)}`;
    const post = (path, body) => request(path, { method: 'POST', body: JSON.stringify(body) }).then((r) => r.json());
    await post('/workspaces', { name: other });
    const { secret } = await post('/keys', { name: 'sdk', workspace: other, role: 'writer' });
    const headers = { 'X-Blaxel-Authorization': `Bearer ${secret}`, 'X-Blaxel-Workspace': other };
    const ask = async (name, path, init) => {
      const answer = await request(`/sandboxes/${name}${path}`, { ...init, headers });
      return `${answer.status} ${(await answer.text()).replaceAll(name, 'NAME')}`;
    };
    for (const [path, init] of [
      ['', {}], ['', { method: 'DELETE' }], ['', { method: 'PUT', body: '{}' }], ['/run/process', {}], ['/run/process/1', {}],
      ['/run/process', { method: 'POST', body: '{"command":"true"}' }], ['/run/filesystem/%2Fetc%2Fpasswd', {}], ['/run/filesystem/%2Fx', { method: 'PUT', body: '{}' }],
    ]) {
      const foreign = await ask(instance.metadata.name, path, init);
      assert.equal(foreign, await ask('box-missing', path, init), path);
      assert.ok(foreign.startsWith('404 '), foreign);
    }
    assert.deepEqual(names((await (await request('/sandboxes', { headers })).json()).data), []);
    await sh(instance, 'true');
  });
});
