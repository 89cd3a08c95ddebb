// Volumes one at a time: create, get, update, delete, and what a caller gets to
// see when it goes wrong.
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { VolumeInstance, createVolume, getVolume, updateVolume } from '@blaxel/core';
import { create, gone, names, refused, region, remember, volumeName } from './kit.mjs';

describe('creating', () => {
  it('keeps what was asked for', async () => {
    const name = volumeName();
    const volume = await VolumeInstance.create({ name, size: 32, region, labels: { env: 'test', language: 'typescript' } });
    assert.equal(volume.name, name);
    assert.equal(volume.displayName, name, 'the SDK sends the name as display name');
    assert.equal(volume.size, 32);
    assert.equal(volume.region, region);
    assert.deepEqual(volume.metadata.labels, { env: 'test', language: 'typescript' });
    assert.equal(volume.metadata.workspace, process.env.BL_WORKSPACE);
  });

  it('takes a display name of its own', async () => {
    const volume = await create({ displayName: 'Data of the café, 日本語' });
    assert.equal(volume.displayName, 'Data of the café, 日本語');
    assert.equal((await VolumeInstance.get(volume.name)).displayName, 'Data of the café, 日本語');
  });

  it('without name, size or region', async () => {
    const volume = remember(await VolumeInstance.create({}));
    assert.match(volume.name, /^volume-[0-9a-f]{8}$/, 'the SDK makes the name');
    assert.equal(volume.size, 1024);
    assert.equal(typeof volume.region, 'string');
    assert.notEqual(volume.region, '', 'the server fills the region');
  });

  it('from a whole volume object', async () => {
    const name = volumeName();
    const volume = await VolumeInstance.create({ metadata: { name, labels: { form: 'object' } }, spec: { size: 16, region } });
    assert.equal(volume.name, name);
    assert.equal(volume.size, 16);
    assert.deepEqual(volume.metadata.labels, { form: 'object' });
  });

  for (const place of ['us-pdx-1', 'us-was-1', 'eu-dub-1', 'auto']) {
    it(`in region ${place}`, async () => {
      assert.equal((await create({ region: place })).region, place);
    });
  }

  it('is usable at once, with times and an event', async () => {
    const volume = await VolumeInstance.get((await create()).name);
    assert.equal(volume.status, 'DEPLOYED');
    for (const time of [volume.metadata.createdAt, volume.metadata.updatedAt]) {
      assert.match(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z$/);
    }
    assert.ok(volume.volume.events.length > 0, 'a volume tells what happened to it');
    assert.ok(!volume.volume.state?.attachedTo, 'nothing uses it');
  });

  it('with a name that is taken is 409, and changes nothing', async () => {
    const first = await create({ labels: { first: 'yes' } });
    const error = await refused(VolumeInstance.create({ name: first.name, size: 64, region }), 409);
    assert.equal(error.error, 'VOLUME_ALREADY_EXISTS');
    const still = await VolumeInstance.get(first.name);
    assert.equal(still.size, 16);
    assert.deepEqual(still.metadata, first.metadata);
  });

  it('tells clients not to repeat a 409', async () => {
    const { name } = await create();
    const { error, response } = await createVolume({ body: { metadata: { name }, spec: { size: 16 } } });
    assert.equal(response.status, 409);
    assert.equal(error.code, response.status);
    assert.equal(response.headers.get('x-should-retry'), 'false');
    assert.match(response.headers.get('content-type'), /^application\/json\b/);
  });

  for (const name of ['Upper', 'under_score', '-dash', 'dash-', 'a b', 'a/b', '../x', 'x'.repeat(50)]) {
    it(`refuses the name ${JSON.stringify(name)}`, async () => {
      await refused(VolumeInstance.create({ name, size: 16, region }), 400);
    });
  }

  for (const size of [-1, 1.5, '16', Number.MAX_SAFE_INTEGER]) {
    it(`refuses the size ${JSON.stringify(size)}`, async () => {
      const error = await refused(VolumeInstance.create({ name: volumeName(), size, region }), 400);
      assert.ok(error.message.includes('size'), error.message);
    });
  }

  it('refuses more than the pool can promise, and makes nothing', async () => {
    const name = volumeName();
    await refused(VolumeInstance.create({ name, size: 1 << 20, region }), 403);
    await refused(VolumeInstance.get(name), 404);
  });
});

describe('createIfNotExists', () => {
  it('makes what is missing', async () => {
    const name = volumeName();
    const volume = await VolumeInstance.createIfNotExists({ name, size: 16, region });
    assert.equal((await VolumeInstance.get(name)).metadata.createdAt, volume.metadata.createdAt);
  });

  it('gives what is there, as it is', async () => {
    const first = await create({ labels: { kept: 'yes' } });
    for (const config of [{ name: first.name, size: 64, region }, { metadata: { name: first.name }, spec: { size: 64, region } }]) {
      const again = await VolumeInstance.createIfNotExists(config);
      assert.equal(again.size, 16);
      assert.equal(again.metadata.createdAt, first.metadata.createdAt);
      assert.deepEqual(again.metadata.labels, { kept: 'yes' });
    }
  });

  it('called by many at once makes one', async () => {
    const name = volumeName('race');
    const all = await Promise.all(Array.from({ length: 8 }, () => VolumeInstance.createIfNotExists({ name, size: 16, region })));
    assert.equal(new Set(all.map((volume) => volume.metadata.createdAt)).size, 1);
    const page = await VolumeInstance.list({ q: name });
    assert.deepEqual(names(page.data), [name]);
  });

  it('does not hide other errors', async () => {
    await refused(VolumeInstance.createIfNotExists({ name: 'Not-A-Name', size: 16, region }), 400);
  });
});

describe('getting', () => {
  it('a volume', async () => {
    const made = await create();
    const got = await VolumeInstance.get(made.name);
    assert.deepEqual(got.metadata, made.metadata);
    assert.deepEqual(got.spec, made.spec);
  });

  it('what is missing is 404', async () => {
    const error = await refused(VolumeInstance.get('no-such-volume'), 404);
    assert.ok(error.message.includes('no-such-volume'), error.message);
  });

  it('odd names is 404 and never another route', async () => {
    for (const name of ['a/b', '..', '%2e%2e', 'Ünïcode', 'x'.repeat(300)]) {
      const { error, response } = await getVolume({ path: { volumeName: name } });
      assert.equal(response.status, 404, name);
      assert.strictEqual(error.code, 404, name);
    }
  });
});

describe('updating', () => {
  it('grows, and keeps all else', async () => {
    const before = await create({ displayName: 'Before', labels: { env: 'test' } });
    const grown = await before.update({ size: 48 });
    assert.equal(grown.size, 48, 'the answer has the new size');
    const after = await VolumeInstance.get(before.name);
    assert.equal(after.size, 48);
    assert.equal(after.status, 'DEPLOYED');
    const { updatedAt, updatedBy, ...metadata } = after.metadata;
    const { updatedAt: earlier, updatedBy: by, ...expected } = before.metadata;
    assert.deepEqual(metadata, expected);
    assert.ok(updatedAt > earlier, `${updatedAt} is not after ${earlier}`);
    assert.equal(updatedBy, by);
    assert.deepEqual({ ...after.spec, size: 0 }, { ...before.spec, size: 0 });
  });

  it('by name, with a whole volume object', async () => {
    const { name } = await create();
    const updated = await VolumeInstance.update(name, { metadata: { name, displayName: 'Renamed' }, spec: { size: 32 } });
    assert.equal(updated.displayName, 'Renamed');
    assert.equal(updated.size, 32);
  });

  it('replaces labels as a whole', async () => {
    const volume = await create({ labels: { old: 'yes', env: 'test' } });
    const updated = await volume.update({ labels: { env: 'prod' } });
    assert.deepEqual(updated.metadata.labels, { env: 'prod' });
    assert.equal(updated.size, 16);
  });

  it('with the size that it has is fine', async () => {
    const volume = await create();
    assert.equal((await volume.update({ size: 16 })).size, 16);
  });

  it('with the size alone is enough, and null says nothing', async () => {
    const { name } = await create({ displayName: 'Kept', labels: { kept: 'yes' } });
    const path = { volumeName: name };
    for (const [size, body] of [
      [24, { spec: { size: 24 } }],
      [40, { metadata: { name, displayName: null, labels: null }, spec: { size: 40, region: null, template: null } }],
    ]) {
      const { data } = await updateVolume({ path, body, throwOnError: true });
      assert.equal(data.spec.size, size);
      assert.equal(data.metadata.displayName, 'Kept');
      assert.deepEqual(data.metadata.labels, { kept: 'yes' });
    }
  });

  it('ignores what a client may not set', async () => {
    const before = await create();
    const { data } = await updateVolume({
      path: { volumeName: before.name },
      body: {
        metadata: { ...before.metadata, createdAt: '2001-01-01T00:00:00Z', createdBy: 'somebody', workspace: 'elsewhere' },
        spec: { ...before.spec, infrastructureId: 'i-1' },
        status: 'FAILED',
        state: { attachedTo: 'sandbox:x' },
      },
      throwOnError: true,
    });
    assert.equal(data.metadata.createdAt, before.metadata.createdAt);
    assert.equal(data.metadata.createdBy, before.metadata.createdBy);
    assert.equal(data.metadata.workspace, before.metadata.workspace);
    assert.equal(data.status, 'DEPLOYED');
    assert.ok(!data.state?.attachedTo);
  });

  it('never shrinks', async () => {
    const volume = await create({ size: 32 });
    await refused(volume.update({ size: 16 }), 400);
    assert.equal((await VolumeInstance.get(volume.name)).size, 32);
  });

  it('does not move to another region', async () => {
    const volume = await create();
    await refused(volume.update({ region: 'eu-lon-1' }), 400);
    assert.equal((await VolumeInstance.get(volume.name)).region, region);
  });

  it('what is missing is 404, and does not create it', async () => {
    await refused(VolumeInstance.update('no-such-volume', { size: 32 }), 404);
    const { response } = await updateVolume({ path: { volumeName: 'no-such-volume' }, body: { spec: { size: 32 } } });
    assert.equal(response.status, 404);
    await refused(VolumeInstance.get('no-such-volume'), 404);
  });
});

describe('deleting', () => {
  it('by name answers the volume, which is gone within 30 s', async () => {
    const { name } = await create();
    const answer = await VolumeInstance.delete(name);
    assert.equal(answer.metadata.name, name);
    assert.equal(answer.status, 'DELETING');
    assert.strictEqual((await gone(name)).code, 404);
  });

  it('through the instance', async () => {
    const volume = await create();
    assert.equal((await volume.delete()).status, 'DELETING');
    await gone(volume.name);
  });

  it('what is missing is 404', async () => {
    await refused(VolumeInstance.delete('no-such-volume'), 404);
    const volume = await create();
    await volume.delete();
    await gone(volume.name);
    await refused(volume.delete(), 404);
  });

  it('frees the name for another', async () => {
    const first = await create({ labels: { life: 'first' } });
    await first.delete();
    await gone(first.name);
    const second = await create({ name: first.name, labels: { life: 'second' } });
    assert.deepEqual(second.metadata.labels, { life: 'second' });
    assert.notEqual(second.metadata.createdAt, first.metadata.createdAt);
  });

  it('takes it out of the listing', async () => {
    const volume = await create();
    assert.deepEqual(names((await VolumeInstance.list({ q: volume.name })).data), [volume.name]);
    await volume.delete();
    await gone(volume.name);
    assert.deepEqual((await VolumeInstance.list({ q: volume.name })).data, []);
  });
});

describe('a whole life', () => {
  it('goes from nothing by DEPLOYED and DELETING to nothing', async () => {
    const name = volumeName('life');
    await refused(VolumeInstance.get(name), 404);
    const volume = await VolumeInstance.create({ name, size: 1, region });
    assert.ok(['CREATED', 'DEPLOYING', 'DEPLOYED'].includes(volume.status), volume.status);
    const deadline = Date.now() + 60_000;
    let { status } = volume;
    while (status !== 'DEPLOYED') {
      assert.ok(Date.now() < deadline && ['CREATED', 'DEPLOYING'].includes(status), status);
      ({ status } = await VolumeInstance.get(name));
    }
    assert.equal((await VolumeInstance.delete(name)).status, 'DELETING');
    assert.strictEqual((await gone(name)).code, 404);
  });
});
