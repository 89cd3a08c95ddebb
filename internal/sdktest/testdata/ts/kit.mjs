// What the test files share: names of their own, waits with a deadline, and
// plain requests where the SDK has no method.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { after } from 'node:test';
import { setTimeout as pause } from 'node:timers/promises';
import {
  SandboxInstance, VolumeInstance, createVolumeTemplate, deleteVolumeTemplate, getVolumeTemplate, updateVolumeTemplate,
} from '@blaxel/core';

export const region = process.env.BL_TEST_REGION ?? 'us-was-1';
export const api = process.env.BL_API_URL;

const made = new Set();
const sandboxes = new Set();
const templates = new Set();

/** A name that nothing else has; the volume of that name is removed at the end. */
export function volumeName(prefix = 'sdk') {
  const name = `${prefix}-${randomBytes(4).toString('hex')}`;
  made.add(name);
  return name;
}

export function templateName(prefix = 'tpl') {
  const name = `${prefix}-${randomBytes(4).toString('hex')}`;
  templates.add(name);
  return name;
}

export function sandboxName(prefix = 'box') {
  const name = `${prefix}-${randomBytes(4).toString('hex')}`;
  sandboxes.add(name);
  return name;
}

/** A sandbox in the volumes' region, removed at the file's end. */
export async function box(config = {}) {
  const instance = await SandboxInstance.create({ name: sandboxName(), memory: 512, region, ...config });
  sandboxes.add(instance.metadata.name);
  return instance;
}

/** Deletes a sandbox and waits until asking for it fails. */
export async function end(instance) {
  assert.equal((await instance.delete()).status, 'DELETING');
  const error = await until(`${instance.metadata.name} is gone`, 30, () => SandboxInstance.get(instance.metadata.name).then(() => null, (e) => e));
  assert.strictEqual(error.code, 404);
}

/** Runs a command to its end; it must succeed unless the caller wants a code. */
export async function sh(instance, command, code = 0) {
  const done = await instance.process.exec({ command, waitForCompletion: true });
  assert.strictEqual(done.exitCode, code, `${command}: ${done.logs}`);
  assert.equal(done.status, code === 0 ? 'completed' : 'failed');
  return done;
}

/** Sends an archive as a template's next version. */
export async function push(name, archive, spec = { defaultSize: 24 }) {
  const path = { volumeTemplateName: name };
  const options = { body: { metadata: { name }, spec }, query: { upload: true }, throwOnError: true };
  const known = await getVolumeTemplate({ path });
  const { response } = known.response.status === 404
    ? await createVolumeTemplate(options)
    : await updateVolumeTemplate({ ...options, path });
  const answer = await fetch(response.headers.get('x-blaxel-upload-url'), {
    method: 'PUT', headers: { 'Content-Type': 'application/x-tar' }, body: archive,
  });
  assert.equal(answer.status, 200, await answer.text());
}

/** Removes, at the file's end, a volume that the server or the SDK named. */
export function remember(volume) {
  made.add(volume.name);
  return volume;
}

/** A volume of 16 MiB unless the configuration says otherwise. */
export function create(config = {}) {
  return VolumeInstance.create({ name: volumeName(), size: 16, region, ...config }).then(remember);
}

after(async () => {
  const missing = (error) => assert.equal(error.code, 404, `clean-up: ${JSON.stringify(error)}`);
  for (const name of sandboxes) {
    await SandboxInstance.delete(name).catch(missing);
    await until(`${name} is gone`, 30, () => SandboxInstance.get(name).then(() => null, (error) => error));
  }
  for (const name of made) await VolumeInstance.delete(name).catch(missing);
  for (const name of templates) {
    await deleteVolumeTemplate({ path: { volumeTemplateName: name }, throwOnError: true }).catch(missing);
  }
});

/** What a promise is rejected with; it fails the test when it is not. */
export async function thrown(promise) {
  let value;
  try {
    value = await promise;
  } catch (error) {
    return error;
  }
  return assert.fail(`expected a rejection, got ${JSON.stringify(value)}`);
}

/** Rejected with the one shape of an error: what the SDK's own logic reads. */
export async function refused(promise, code) {
  const error = await thrown(promise);
  assert.equal(typeof error, 'object', `the SDK gives the parsed body: ${error}`);
  assert.strictEqual(error.code, code, JSON.stringify(error));
  assert.equal(typeof error.error, 'string');
  assert.equal(typeof error.message, 'string');
  assert.notEqual(error.message, '');
  return error;
}

/** Asks until the answer is one, or the deadline has passed. */
export async function until(what, seconds, ask) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const answer = await ask();
    if (answer) return answer;
    assert.ok(Date.now() < deadline, `${what}: not within ${seconds} s`);
    await pause(50);
  }
}

/** Waits until GET fails, as the SDK's own suites do: at most 30 s. */
export function gone(name) {
  return until(`${name} is gone`, 30, () => VolumeInstance.get(name).then(() => null, (error) => error));
}

/** A request without the SDK, with the credentials that it would send. */
export function request(path, { headers, ...init } = {}) {
  return fetch(`${api}${path}`, {
    ...init,
    headers: {
      'X-Blaxel-Authorization': `Bearer ${process.env.BL_API_KEY}`,
      'X-Blaxel-Workspace': process.env.BL_WORKSPACE,
      'Blaxel-Version': '2026-04-28',
      ...headers,
    },
  });
}

/** The text of a file inside a volume, or null when the volume has none there. */
export async function fileIn(volume, path) {
  const answer = await request(`/volumes/${volume}/files/content?path=${encodeURIComponent(path)}`);
  if (answer.status === 404) return null;
  assert.equal(answer.status, 200, `${path}: ${answer.status}`);
  return answer.text();
}

export const names = (volumes) => volumes.map((volume) => volume.name);
