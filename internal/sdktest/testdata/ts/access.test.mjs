// Credentials: each way in, and what a caller sees outside.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { afterEach, describe, it } from 'node:test';
import { VolumeInstance, initialize } from '@blaxel/core';
import { create, names, refused, request } from './kit.mjs';

const { BL_WORKSPACE: workspace, BL_API_KEY: apiKey } = process.env;

afterEach(() => initialize({ workspace, apiKey }));

/** A workspace of its own, with a key that is good there alone. */
async function otherWorkspace() {
  const name = `ws-${randomBytes(4).toString('hex')}`;
  const post = async (path, body) => {
    const answer = await request(path, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body) });
    assert.equal(answer.status, 200, `${path}: ${answer.status}`);
    return answer.json();
  };
  await post('/workspaces', { name });
  const { secret } = await post('/keys', { name: 'sdk', workspace: name, role: 'writer' });
  return { workspace: name, apiKey: secret };
}

describe('credentials', () => {
  it('that are wrong are 401, with the SDK\'s hint', async () => {
    initialize({ workspace, apiKey: 'bl_wrong' });
    const error = await refused(VolumeInstance.list(), 401);
    assert.equal(typeof error.documentation, 'string', 'the SDK adds this to JSON only');
  });

  it('for a workspace that is not there are 404', async () => {
    initialize({ workspace: 'elsewhere', apiKey });
    await refused(VolumeInstance.list(), 404);
  });

  it('give no rights in another workspace', async () => {
    const other = await otherWorkspace();
    await create();
    initialize({ ...other, workspace });
    const error = await refused(VolumeInstance.list(), 403);
    assert.equal(typeof error.documentation, 'string');
  });

  it('show one workspace\'s volumes to nobody else', async () => {
    const other = await otherWorkspace();
    await create();
    const { name } = await create();
    const { nextCursor: cursor } = await VolumeInstance.list({ limit: 1 });
    initialize(other);
    await refused(VolumeInstance.get(name), 404);
    await refused(VolumeInstance.update(name, { size: 32 }), 404);
    await refused(VolumeInstance.delete(name), 404);
    assert.deepEqual((await VolumeInstance.list()).data, []);
    await refused(VolumeInstance.list({ limit: 1, cursor }), 400);
    const same = await VolumeInstance.create({ name, size: 16, region: 'us-pdx-1' });
    assert.deepEqual(names((await VolumeInstance.list()).data), [name]);
    await same.delete();
  });

  it('of a client get a token', async () => {
    const { name } = await create();
    initialize({ workspace, clientCredentials: { clientId: 'any', clientSecret: apiKey } });
    assert.equal((await VolumeInstance.get(name)).name, name);
  });

  it('may stand in either header', async () => {
    for (const headers of [{ 'X-Blaxel-Authorization': `Bearer ${apiKey}` }, { Authorization: `Bearer ${apiKey}` }]) {
      const answer = await fetch(`${process.env.BL_API_URL}/volumes`, { headers: { ...headers, 'X-Blaxel-Workspace': workspace } });
      assert.equal(answer.status, 200);
      await answer.text();
    }
  });
});

describe('the version header', () => {
  it('decides the listing\'s form', async () => {
    await create();
    const today = await (await request('/volumes')).json();
    assert.ok(Array.isArray(today.data));
    const earlier = await (await request('/volumes', { headers: { 'Blaxel-Version': '2026-04-16' } })).json();
    assert.ok(Array.isArray(earlier));
    const unknown = await request('/volumes', { headers: { 'Blaxel-Version': '2026-99-99' } });
    assert.equal(unknown.status, 400);
    assert.equal((await unknown.json()).error, 'invalid_api_version');
  });
});
