// Templates: a tar goes up, volumes come out of it, version by version.
import assert from 'node:assert/strict';
import { before, describe, it } from 'node:test';
import { gzipSync } from 'node:zlib';
import {
  VolumeInstance, createVolume, createVolumeTemplate, deleteVolumeTemplate, deleteVolumeTemplateVersion,
  getVolumeTemplate, listVolumeTemplates, updateVolumeTemplate,
} from '@blaxel/core';
import { create, fileIn, refused, region, remember, templateName, volumeName } from './kit.mjs';
import { tar } from './tar.mjs';

const first = tar({ 'app/': null, 'app/main.txt': 'one\n', 'empty/': null, 'café.txt': 'ünïcode\n', 'empty.txt': '' });
const second = tar({ 'app/': null, 'app/main.txt': 'two\n', 'app/new.txt': 'new\n' });

const path = (name) => ({ volumeTemplateName: name });
const get = async (name) => (await getVolumeTemplate({ path: path(name), throwOnError: true })).data;

/** Registers a version and gives the URL that its archive goes to. */
async function begin(name, spec = { defaultSize: 24 }) {
  const options = { body: { metadata: { name }, spec }, query: { upload: true }, throwOnError: true };
  const known = await getVolumeTemplate({ path: path(name) });
  const { data, response } = known.response.status === 404
    ? await createVolumeTemplate(options)
    : await updateVolumeTemplate({ ...options, path: path(name) });
  assert.equal(data.metadata.name, name);
  return response.headers.get('x-blaxel-upload-url');
}

/** Sends an archive: no credentials, the URL carries its own. */
const send = (url, body) => fetch(url, { method: 'PUT', headers: { 'Content-Type': 'application/x-tar' }, body });

async function push(name, archive) {
  const answer = await send(await begin(name), archive);
  assert.equal(answer.status, 200, await answer.text());
}

const shared = templateName();
before(async () => {
  await push(shared, first);
  await push(shared, second);
});

describe('a template', () => {
  it('is READY when its upload is answered', async () => {
    const name = templateName();
    const url = await begin(name);
    assert.ok(url.startsWith('http://127.0.0.1:'), url);
    const waiting = await get(name);
    assert.equal(waiting.state.status, 'created');
    assert.equal(waiting.versions[0].status, 'CREATED');
    const answer = await send(url, first);
    assert.equal(answer.status, 200, await answer.text());
    const ready = await get(name);
    assert.equal(ready.state.status, 'ready');
    assert.equal(ready.state.latestVersion, '1');
    assert.equal(ready.state.versionCount, 1);
    assert.equal(ready.spec.defaultSize, 24);
    const [version] = ready.versions;
    assert.equal(version.name, '1');
    assert.equal(version.templateName, name);
    assert.equal(version.status, 'READY');
    assert.ok(version.contentSize > 0);
  });

  it('is in the listing, which is a bare array', async () => {
    const { data } = await listVolumeTemplates({ throwOnError: true });
    assert.ok(Array.isArray(data));
    const found = data.filter((template) => template.metadata.name === shared);
    assert.equal(found.length, 1);
    assert.equal(found[0].state.latestVersion, '2');
    assert.deepEqual(found[0].versions.map((version) => version.name).sort(), ['1', '2']);
  });

  it('whose name is taken is 409', async () => {
    await refused(createVolumeTemplate({ body: { metadata: { name: shared }, spec: {} }, throwOnError: true }), 409);
  });

  it('that is missing is 404', async () => {
    await refused(get('no-such-template'), 404);
    await refused(deleteVolumeTemplate({ path: path('no-such-template'), throwOnError: true }), 404);
  });

  it('asks for no upload unless told to', async () => {
    const { response } = await createVolumeTemplate({ body: { metadata: { name: templateName() }, spec: {} }, throwOnError: true });
    assert.equal(response.headers.get('x-blaxel-upload-url'), null);
  });
});

describe('an upload', () => {
  it('is taken once', async () => {
    const url = await begin(templateName());
    assert.equal((await send(url, first)).status, 200);
    assert.equal((await send(url, second)).status, 400);
  });

  it('needs the URL as it was given', async () => {
    const url = new URL(await begin(templateName()));
    url.search = url.search.replace(/.$/, (last) => (last === 'A' ? 'B' : 'A'));
    assert.equal((await send(url, first)).status, 400);
  });

  it('of what is no tar is refused and leaves the latest version alone', async () => {
    const name = templateName();
    await push(name, first);
    for (const bad of [gzipSync(first).subarray(0, 60), Buffer.from('no archive'), tar({ '../escape': 'x' }), first.subarray(0, 700)]) {
      const { status } = await send(await begin(name), bad);
      assert.ok(status >= 400 && status < 500, `${status}`);
    }
    assert.equal((await get(name)).state.latestVersion, '1');
    const volume = await create({ template: name });
    assert.equal(await fileIn(volume.name, '/app/main.txt'), 'one\n');
  });
});

describe('an upload packed with gzip', () => {
  it('is unpacked', async () => {
    const name = templateName();
    await push(name, gzipSync(first));
    const volume = await create({ template: name });
    assert.equal(await fileIn(volume.name, '/app/main.txt'), 'one\n');
  });
});

describe('a volume', () => {
  for (const [reference, text, version] of [['', 'two\n', '2'], [':latest', 'two\n', '2'], [':1', 'one\n', '1'], [':2', 'two\n', '2']]) {
    it(`from NAME${reference} has version ${version}`, async () => {
      const volume = await create({ template: shared + reference });
      assert.equal(volume.status, 'DEPLOYED');
      assert.equal(volume.spec.template, `${shared}:${version}`);
      assert.equal(await fileIn(volume.name, '/app/main.txt'), text);
      assert.equal(await fileIn(volume.name, '/app/new.txt'), version === '2' ? 'new\n' : null);
      assert.equal(await fileIn(volume.name, '/café.txt'), version === '1' ? 'ünïcode\n' : null);
      assert.equal(await fileIn(volume.name, '/empty.txt'), version === '1' ? '' : null);
    });
  }

  it('from a template grows with its content', async () => {
    const volume = await create({ template: `${shared}:1` });
    const grown = await volume.update({ size: 64 });
    assert.equal(grown.size, 64);
    assert.equal(grown.spec.template, `${shared}:1`);
    assert.equal(await fileIn(volume.name, '/app/main.txt'), 'one\n');
  });

  it('without a size has the default size of its template', async () => {
    const name = volumeName();
    const { data } = await createVolume({ body: { metadata: { name }, spec: { template: shared, region } }, throwOnError: true });
    assert.equal(data.spec.size, 24);
    assert.equal(remember(new VolumeInstance(data)).name, name);
  });

  it('from what is missing is 400, and is not made', async () => {
    for (const template of ['no-such-template', `${shared}:99`, `${shared}:`, 'UPPER:1', '../x']) {
      const name = volumeName();
      await refused(VolumeInstance.create({ name, size: 16, region, template }), 400);
      await refused(VolumeInstance.get(name), 404);
    }
  });

  it('too small for the content is refused, and is not made', async () => {
    const large = templateName();
    await push(large, tar({ 'large.bin': Buffer.alloc(6 << 20, 'x') }));
    const name = volumeName();
    await refused(VolumeInstance.create({ name, size: 4, region, template: large }), 400);
    await refused(VolumeInstance.get(name), 404);
  });
});

describe('deleting', () => {
  it('a version takes it from new volumes, not from those that are', async () => {
    const name = templateName();
    await push(name, first);
    await push(name, second);
    const volume = await create({ template: `${name}:1` });
    const { data } = await deleteVolumeTemplateVersion({ path: { ...path(name), versionName: '1' }, throwOnError: true });
    assert.equal(typeof data.message, 'string');
    assert.deepEqual(data.template.versions.map((version) => version.name), ['2']);
    assert.equal(await fileIn(volume.name, '/app/main.txt'), 'one\n');
    await refused(VolumeInstance.create({ name: volumeName(), size: 16, region, template: `${name}:1` }), 400);
    await refused(deleteVolumeTemplateVersion({ path: { ...path(name), versionName: '1' }, throwOnError: true }), 404);
    await refused(deleteVolumeTemplateVersion({ path: { ...path(name), versionName: '2' }, throwOnError: true }), 400);
  });

  it('a template leaves its volumes alone', async () => {
    const name = templateName();
    await push(name, first);
    const volume = await create({ template: name });
    const { data } = await deleteVolumeTemplate({ path: path(name), throwOnError: true });
    assert.equal(data.metadata.name, name);
    await refused(get(name), 404);
    await refused(VolumeInstance.create({ name: volumeName(), size: 16, region, template: name }), 400);
    assert.equal(await fileIn(volume.name, '/app/main.txt'), 'one\n');
    assert.equal((await VolumeInstance.get(volume.name)).status, 'DEPLOYED');
  });
});
