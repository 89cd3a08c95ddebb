// Volumes where they are used: in sandboxes.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { SandboxInstance, VolumeInstance } from '@blaxel/core';
import { box, create, end, push, refused, region, remember, sandboxName, sh, templateName, thrown, until, volumeName } from './kit.mjs';
import { tar } from './tar.mjs';

const at = (mountPath, volume, more = {}) => ({ name: volume.name, mountPath, readOnly: false, ...more });

/** What df says of a path: sizes in MiB, the share that is used in percent. */
async function df(instance, path) {
  const { stdout } = await sh(instance, `df -m ${path}`);
  const [, size, used, free, percent] = stdout.trim().split('\n').at(-1).split(/\s+/);
  return { size: Number(size), used: Number(used), free: Number(free), percent: Number.parseInt(percent, 10) };
}

const attachedTo = async (volume) => (await VolumeInstance.get(volume.name)).volume.state?.attachedTo ?? '';

describe('a volume in a sandbox', () => {
  it('is a filesystem at its mount path, where files are written and read', async () => {
    const volume = await create();
    const instance = await box({ volumes: [at('/data', volume)] });
    assert.equal(instance.status, 'DEPLOYED');
    assert.deepEqual(instance.spec.volumes.map(({ name, mountPath, readOnly }) => ({ name, mountPath, readOnly })), [at('/data', volume)]);
    await sh(instance, "echo 'kept on a volume' > /data/note.txt");
    assert.equal((await sh(instance, 'cat /data/note.txt')).logs.trim(), 'kept on a volume');
    assert.match((await sh(instance, 'grep " /data " /proc/mounts')).stdout, /^\/dev\/\S+ \/data ext4 rw,nosuid,nodev,/);
    assert.equal(await attachedTo(volume), `sandbox:${instance.metadata.name}`);
  });

  it('keeps its data for the next sandbox, at another place', async () => {
    const volume = await create();
    const one = await box({ volumes: [at('/data', volume)] });
    await sh(one, 'echo "written by the first" > /data/f && chown 7:8 /data/f && chmod 640 /data/f');
    await end(one);
    assert.equal(await attachedTo(volume), '');
    const two = await box({ volumes: [at('/mnt/elsewhere/deep', volume)] });
    assert.equal((await sh(two, 'cat /mnt/elsewhere/deep/f')).stdout, 'written by the first\n');
    assert.equal((await sh(two, "stat -c '%u:%g %a' /mnt/elsewhere/deep/f")).stdout, '7:8 640\n', 'owners are the same in every sandbox');
    assert.equal((await sh(two, 'ls /data', 1)).stdout, '');
  });

  it('is there for a sandbox that is created while the one before is being deleted', async () => {
    const volume = await create();
    const one = await box({ volumes: [at('/data', volume)] });
    await sh(one, 'echo x > /data/x');
    assert.equal((await one.delete()).status, 'DELETING');
    const two = await box({ volumes: [at('/data', volume)] });
    assert.equal((await sh(two, 'cat /data/x')).stdout, 'x\n');
  });

  it('has the room that it was given, and no more', async () => {
    const volume = await create({ size: 512 });
    const instance = await box({ volumes: [at('/data', volume)] });
    const failed = await instance.process.exec({ command: 'dd if=/dev/zero of=/data/big bs=1M count=600', waitForCompletion: true });
    assert.equal(failed.status, 'failed');
    assert.notEqual(failed.exitCode, 0);
    assert.match(failed.logs, /No space left on device/);
    const { size, used } = await df(instance, '/data');
    assert.ok(size > 470 && used > 450, `most of 512 MiB are for files: ${size}, ${used} used`);
    await end(instance);
  });

  it('grows between two sandboxes, with what is on it', async () => {
    const volume = await create({ size: 512 });
    const small = await box({ volumes: [at('/data', volume)] });
    const fill = 'dd if=/dev/urandom of=/tmp/part bs=1M count=8 2>/dev/null; for i in $(seq 50); do cat /tmp/part; done > /data/first; md5sum /data/first';
    const sum = (await sh(small, fill)).stdout;
    const before = await df(small, '/data');
    assert.ok(before.percent > 60, `${before.percent} % are used`);
    await end(small);
    assert.equal((await volume.update({ size: 1024 })).size, 1024, 'the answer has the new size');
    const large = await box({ volumes: [at('/data', volume)] });
    const after = await df(large, '/data');
    assert.ok(after.percent < before.percent && after.size > 940, JSON.stringify(after));
    await sh(large, 'dd if=/dev/zero of=/data/second bs=1M count=400 && sync');
    assert.equal((await sh(large, 'md5sum /data/first && ls /data/second')).stdout, `${sum}/data/second\n`);
    await end(large);
  });

  it('that is told to grow while it is in use has grown for the next sandbox', async () => {
    const volume = await create({ size: 32 });
    const instance = await box({ volumes: [at('/data', volume)] });
    await sh(instance, 'echo x > /data/x');
    assert.equal((await volume.update({ size: 64 })).size, 64);
    assert.equal((await sh(instance, 'cat /data/x')).stdout, 'x\n', 'the sandbox goes on');
    await end(instance);
    const next = await box({ volumes: [at('/data', volume)] });
    const { size } = await df(next, '/data');
    assert.ok(size > 50, `${size} MiB`);
    assert.equal((await sh(next, 'cat /data/x')).stdout, 'x\n');
  });

  for (const filesystem of ['xfs', 'btrfs']) {
    it(`with ${filesystem} grows under a running sandbox`, async () => {
      const volume = remember(await VolumeInstance.create({ metadata: { name: volumeName() }, spec: { size: 320, region, filesystem } }));
      const instance = await box({ volumes: [at('/data', volume)] });
      const before = await df(instance, '/data');
      await volume.update({ size: 448 });
      await until('df shows more', 60, async () => (await df(instance, '/data')).size > before.size + 100);
      await end(instance);
      await volume.delete();
    });
  }

  it('read-only can be read and not written', async () => {
    const volume = await create();
    const writer = await box({ volumes: [at('/data', volume)] });
    await sh(writer, 'echo fixed > /data/f');
    await end(writer);
    const reader = await box({ volumes: [at('/data', volume, { readOnly: true })] });
    assert.equal((await sh(reader, 'cat /data/f')).stdout, 'fixed\n');
    for (const command of ['echo x > /data/f', 'rm /data/f', 'touch /data/new', 'mount -o remount,rw /data', 'chmod 777 /data/f']) {
      const { exitCode } = await reader.process.exec({ command, waitForCompletion: true });
      assert.notEqual(exitCode, 0, command);
    }
    const second = await box({ volumes: [at('/other', volume, { readOnly: true })] });
    assert.equal((await sh(second, 'cat /other/f')).stdout, 'fixed\n', 'many readers');
    const error = await thrown(SandboxInstance.create({ name: sandboxName(), region, volumes: [at('/data', volume)] }));
    assert.equal(error.code, 'VOLUME_ATTACHED');
  });

  it('shares a sandbox with others', async () => {
    const volumes = await Promise.all(Array.from({ length: 4 }, () => create()));
    const places = ['/a', '/b', '/b/inside', '/deep/er/c'];
    const instance = await box({ volumes: volumes.map((volume, i) => at(places[i], volume)).reverse() });
    for (const [i, place] of places.entries()) await sh(instance, `echo ${i} > ${place}/which`);
    for (const [i, place] of places.entries()) assert.equal((await sh(instance, `cat ${place}/which`)).stdout, `${i}\n`);
    const devices = (await sh(instance, `stat -c %d ${places.join(' ')}`)).stdout.trim().split('\n');
    assert.equal(new Set(devices).size, 4, 'four filesystems');
    for (const volume of volumes) assert.equal(await attachedTo(volume), `sandbox:${instance.metadata.name}`);
    await end(instance);
    for (const volume of volumes) assert.equal(await attachedTo(volume), '');
  });

  it('comes from a template, by revision', async () => {
    const name = templateName();
    await push(name, tar({ 'app/': null, 'app/main.txt': 'one\n' }));
    const first = await create({ size: 24, template: name });
    const boxOne = await box({ volumes: [at('/app', first)] });
    assert.equal((await sh(boxOne, 'cat /app/app/main.txt; ls /app/app')).stdout, 'one\nmain.txt\n');
    await push(name, tar({ 'app/': null, 'app/main.txt': 'two\n', 'app/new.txt': 'new\n' }));
    const latest = await create({ size: 24, template: name });
    const pinned = await create({ size: 24, template: `${name}:1` });
    const both = await box({ volumes: [at('/latest', latest), at('/pinned', pinned)] });
    assert.equal((await sh(both, 'cat /latest/app/main.txt; ls /latest/app')).stdout, 'two\nmain.txt\nnew.txt\n');
    assert.equal((await sh(both, 'cat /pinned/app/main.txt; ls /pinned/app')).stdout, 'one\nmain.txt\n');
    assert.equal((await sh(both, "echo mine > /pinned/app/main.txt; stat -c '%u %g' /latest/app/new.txt")).stdout, '1000 1000\n');
    assert.equal((await sh(boxOne, 'cat /app/app/main.txt')).stdout, 'one\n', 'each has its own');
  });
});

describe('an ephemeral volume', () => {
  it('is made with its sandbox and goes with it', async () => {
    const instance = await box({ volumes: [{ name: 'scratch', mountPath: '/scratch', type: 'ephemeral', sizeMb: 48 }] });
    const write = await sh(instance, 'echo temporary > /scratch/t && cat /scratch/t');
    assert.equal(write.stdout, 'temporary\n');
    const { size } = await df(instance, '/scratch');
    assert.ok(size > 35 && size <= 48, `${size} MiB`);
    const mine = (page) => page.data.filter((v) => v.metadata.labels?.['holdfast-ephemeral'] === instance.metadata.name);
    const [marked, ...more] = mine(await VolumeInstance.list());
    assert.equal(more.length, 0);
    assert.equal(marked.size, 48, 'it is a volume of the workspace, with a label that says what it is');
    await refused(VolumeInstance.delete(marked.name), 409);
    await end(instance);
    assert.deepEqual(mine(await VolumeInstance.list()), []);
    await refused(VolumeInstance.get(marked.name), 404);
  });

  it('stands beside a persistent one', async () => {
    const volume = await create();
    const instance = await box({ volumes: [at('/data', volume), { name: 'scratch', mountPath: '/data/tmp', type: 'ephemeral', sizeMb: 16 }] });
    await sh(instance, 'echo stays > /data/f; echo goes > /data/tmp/f');
    await end(instance);
    const next = await box({ volumes: [at('/data', volume)] });
    assert.equal((await sh(next, 'cat /data/f; ls -A /data/tmp')).stdout, 'stays\n');
  });
});

describe('creating a sandbox with a volume', () => {
  const fails = async (volumes, code, status, text) => {
    const name = sandboxName();
    const error = await thrown(SandboxInstance.create({ name, region, volumes }));
    assert.equal(error.code, code, JSON.stringify(error));
    assert.equal(error.status_code, status);
    assert.equal(error.sandbox_name, name);
    assert.ok(error.message.includes(text), error.message);
    await refused(SandboxInstance.get(name), 404);
  };

  it('whose name is taken is 409 SANDBOX_ALREADY_EXISTS, and takes nothing', async () => {
    const [held, free] = [await create(), await create()];
    const instance = await box({ volumes: [at('/data', held)] });
    const { name } = instance.metadata;
    for (const volume of [held, free]) {
      const error = await thrown(SandboxInstance.create({ name, region, volumes: [at('/data', volume)] }));
      assert.equal(error.code, 'SANDBOX_ALREADY_EXISTS');
      assert.equal(error.status_code, 409);
      assert.equal(error.sandbox_name, name);
    }
    assert.equal(await attachedTo(free), '');
    const again = await SandboxInstance.createIfNotExists({ name, region, volumes: [at('/data', held)] });
    assert.equal(again.metadata.createdAt, instance.metadata.createdAt);
    await sh(again, 'touch /data/still');
  });

  it('that is not there is refused, and leaves nothing', () => fails([{ name: 'no-such-volume', mountPath: '/data' }], 'VOLUME_NOT_FOUND', 400, 'no-such-volume'));

  it('that another sandbox has is refused, and frees what it took', async () => {
    const [held, free] = [await create(), await create()];
    const instance = await box({ volumes: [at('/data', held)] });
    await fails([at('/free', free), at('/held', held)], 'VOLUME_ATTACHED', 409, `sandbox:${instance.metadata.name}`);
    assert.equal(await attachedTo(free), '');
    await sh(instance, 'touch /data/unharmed');
  });

  it('at an impossible place is refused', async () => {
    const volume = await create();
    for (const mountPath of ['data', '/', '/proc/x', '/dev', '/a/../b', '/a//b', '/etc/passwd', '/etc/passwd/x']) {
      await fails([at(mountPath, volume)], 'INVALID_REQUEST', 400, 'mountPath');
    }
    await fails([at('/a', volume), at('/b', volume)], 'INVALID_REQUEST', 400, 'twice');
    await fails([at('/a', volume), at('/a', await create())], 'INVALID_REQUEST', 400, 'twice');
    assert.equal(await attachedTo(volume), '');
  });

  it('that is larger than the pool is refused as an ephemeral one', () =>
    fails([{ name: 's', mountPath: '/s', type: 'ephemeral', sizeMb: 1 << 20 }], 'POOL_FULL', 403, 'pool'));
});

describe('a volume that is in use', () => {
  it('cannot be deleted before its sandbox is gone', async () => {
    const volume = await create();
    const instance = await box({ volumes: [at('/data', volume)] });
    assert.equal((await refused(volume.delete(), 409)).error, 'VOLUME_ATTACHED');
    await instance.delete();
    await until('the volume can be deleted', 30, () => volume.delete().then(() => true, (error) => {
      assert.strictEqual(error.code, 409);
      return false;
    }));
    await refused(VolumeInstance.get(volume.name), 404);
  });
});
