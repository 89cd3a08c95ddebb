// External ids: the caller's own handle of a volume.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { describe, it } from 'node:test';
import { VolumeInstance, getVolumeByExternalId, updateVolume } from '@blaxel/core';
import { gone, names, refused, region, volumeName } from './kit.mjs';

const id = (prefix = 'session') => `${prefix}-${randomBytes(6).toString('hex')}`;
const byId = async (externalId) => (await getVolumeByExternalId({ path: { externalId }, throwOnError: true })).data;
const withId = (externalId) => VolumeInstance.create({ metadata: { name: volumeName('ext'), externalId }, spec: { size: 16, region } });

describe('an external id', () => {
  it('is given at creation and finds the volume', async () => {
    const externalId = id();
    const volume = await withId(externalId);
    assert.equal(volume.metadata.externalId, externalId);
    assert.equal((await VolumeInstance.get(volume.name)).metadata.externalId, externalId);
    assert.equal((await byId(externalId)).metadata.name, volume.name);
    assert.deepEqual(names((await VolumeInstance.list({ externalId })).data), [volume.name]);
    assert.equal((await VolumeInstance.list({ q: volume.name })).data[0].metadata.externalId, externalId);
  });

  it('that no volume has is 404, and lists nothing', async () => {
    await refused(byId('none'), 404);
    assert.deepEqual((await VolumeInstance.list({ externalId: id() })).data, []);
  });

  it('can be changed: the old one then finds nothing', async () => {
    const [from, to] = [id('from'), id('to')];
    const { name } = await withId(from);
    const { data } = await updateVolume({ path: { volumeName: name }, body: { metadata: { name, externalId: to } }, throwOnError: true });
    assert.equal(data.metadata.externalId, to);
    assert.equal((await byId(to)).metadata.name, name);
    await refused(byId(from), 404);
    assert.deepEqual((await VolumeInstance.list({ externalId: from })).data, []);
  });

  it('stays when an update does not name it', async () => {
    const externalId = id();
    const volume = await withId(externalId);
    assert.equal((await volume.update({ size: 32 })).metadata.externalId, externalId);
    const { data } = await updateVolume({ path: { volumeName: volume.name }, body: { spec: { size: 48 } }, throwOnError: true });
    assert.equal(data.metadata.externalId, externalId);
    assert.equal((await byId(externalId)).spec.size, 48);
  });

  it('is refused when it is too long or has other characters', async () => {
    for (const externalId of ['x'.repeat(65), 'has spaces!', 'a/b', 'ünïcode']) {
      await refused(withId(externalId), 400);
    }
    assert.equal((await withId('x'.repeat(64 - 8) + randomBytes(4).toString('hex'))).metadata.externalId.length, 64);
  });

  it('goes with its volume, and comes back with the next', async () => {
    const externalId = id();
    const first = await withId(externalId);
    await first.delete();
    await gone(first.name);
    await refused(byId(externalId), 404);
    const second = await withId(externalId);
    assert.equal((await byId(externalId)).metadata.name, second.name);
  });

  it('of two volumes means the newer', async () => {
    const externalId = id();
    const older = await withId(externalId);
    const newer = await withId(externalId);
    assert.equal((await byId(externalId)).metadata.name, newer.name);
    await newer.delete();
    await gone(newer.name);
    assert.equal((await byId(externalId)).metadata.name, older.name);
  });
});
