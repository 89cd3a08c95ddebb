// Listings: pages, cursors, order, search and filters.
import assert from 'node:assert/strict';
import { before, describe, it } from 'node:test';
import { VolumeInstance } from '@blaxel/core';
import { create, names, refused, region, volumeName } from './kit.mjs';

const tag = volumeName('page');
const made = []; // oldest first
const all = 100_000;

before(async () => {
  const labels = [{ colour: 'red' }, { colour: 'blue' }, {}, { 'team.holdfast/owner': 'storage' }, { colour: 'red' }];
  for (const [i, label] of labels.entries()) {
    // Names in another order than times.
    const name = `${tag}-${'cebda'[i]}`;
    made.push(await create({ name: volumeName(name), displayName: `Shelf ${i} of ${tag}`, labels: { run: tag, ...label } }));
  }
});

const newestFirst = () => names(made).reverse();
const byName = () => names(made).sort();
const every = async (query) => names(await (await VolumeInstance.list(query)).autoPagingToArray({ limit: all }));

describe('a page', () => {
  it('of the defaults begins with the newest', async () => {
    const { name } = await create();
    const page = await VolumeInstance.list();
    assert.ok(Array.isArray(page.data));
    assert.equal(page.data[0].name, name);
    assert.ok(page.data.every((volume) => volume instanceof VolumeInstance));
    assert.ok(page.meta.total >= page.data.length);
  });

  it('has the fields that callers read', async () => {
    const volume = (await VolumeInstance.list({ q: made[0].name })).data[0];
    assert.equal(volume.name, made[0].name);
    assert.equal(volume.displayName, made[0].displayName);
    assert.equal(volume.size, 16, 'in MB');
    assert.equal(volume.region, region);
    assert.equal(volume.status, 'DEPLOYED');
    assert.equal(volume.metadata.createdAt, made[0].metadata.createdAt);
    assert.equal(volume.metadata.updatedAt, made[0].metadata.updatedAt);
    assert.deepEqual(volume.metadata.labels, made[0].metadata.labels);
  });

  it('of one item leads to the next', async () => {
    const page = await VolumeInstance.list({ limit: 1 });
    assert.equal(page.data.length, 1);
    assert.equal(page.hasMore, true);
    assert.equal(page.meta.hasMore, true);
    assert.ok(page.nextCursor);
    const next = await page.nextPage();
    assert.equal(next.data.length, 1);
    assert.notEqual(next.data[0].name, page.data[0].name);
    assert.notEqual(next.nextCursor, page.nextCursor);
  });

  it('at the end has no cursor and no more', async () => {
    const page = await VolumeInstance.list({ q: tag, limit: made.length });
    assert.equal(page.data.length, made.length);
    assert.equal(page.meta.hasMore, false);
    assert.ok(!page.meta.nextCursor);
    assert.equal(await page.nextPage(), null);
  });

  it('that nothing matches is an empty array', async () => {
    const page = await VolumeInstance.list({ q: 'no-volume-is-called-this' });
    assert.deepEqual(page.data, []);
    assert.equal(page.meta.hasMore, false);
  });

  it('larger than the largest is clamped, an impossible one refused', async () => {
    assert.equal((await VolumeInstance.list({ q: tag, limit: 5000 })).data.length, made.length);
    for (const limit of [0, -1, 'ten']) await refused(VolumeInstance.list({ limit }), 400);
  });
});

describe('walking', () => {
  for (const limit of [1, 2, 5, 200]) {
    it(`by ${limit} finds each once`, async () => {
      assert.deepEqual(await every({ q: tag, limit }), newestFirst());
    });
  }

  it('everything finds each once', async () => {
    const found = await every({ limit: 1 });
    assert.equal(new Set(found).size, found.length);
    for (const name of names(made)) assert.ok(found.includes(name), name);
  });

  it('stops where the caller says', async () => {
    const page = await VolumeInstance.list({ q: tag, limit: 2 });
    assert.deepEqual(names(await page.autoPagingToArray({ limit: 3 })), newestFirst().slice(0, 3));
  });

  it('as an async iterator', async () => {
    const found = [];
    for await (const volume of await VolumeInstance.list({ q: tag, sort: 'name:asc', limit: 2 })) found.push(volume.name);
    assert.deepEqual(found, byName());
  });

  it('is not disturbed by a volume made or deleted meanwhile', async () => {
    const run = volumeName('walk');
    const four = [];
    for (let i = 0; i < 4; i += 1) four.push(await create({ name: volumeName(`${run}-${i}`) }));
    const [oldest, second, third, newest] = four;
    const first = await VolumeInstance.list({ q: run, limit: 2 });
    assert.deepEqual(names(first.data), [newest.name, third.name]);
    await create({ name: volumeName(`${run}-late`) });
    await third.delete(); // the one that the cursor stands on
    const next = await first.nextPage();
    assert.deepEqual(names(next.data), [second.name, oldest.name]);
    assert.equal(next.hasMore, false);
  });
});

describe('order', () => {
  it('by name', async () => {
    assert.deepEqual(await every({ q: tag, sort: 'name:asc', limit: 2 }), byName());
    assert.deepEqual(await every({ q: tag, sort: 'name:desc', limit: 2 }), byName().reverse());
  });

  it('by time', async () => {
    assert.deepEqual(await every({ q: tag, sort: 'createdAt:asc', limit: 2 }), names(made));
    assert.deepEqual(await every({ q: tag, sort: 'createdAt:desc', limit: 2 }), newestFirst());
  });

  it('that does not exist is refused', async () => {
    await refused(VolumeInstance.list({ sort: 'size:asc' }), 400);
  });

  it('from the end gives the tail page', async () => {
    const page = await VolumeInstance.list({ q: tag, anchor: 'end', limit: 2 });
    assert.deepEqual(names(page.data), newestFirst().slice(-2));
    await refused(VolumeInstance.list({ anchor: 'end', sort: 'name:asc' }), 400);
  });
});

describe('search', () => {
  it('finds names, display names, label keys and label values', async () => {
    assert.deepEqual(await every({ q: made[2].name }), [made[2].name]);
    assert.deepEqual(await every({ q: `shelf 1 of ${tag}` }), [made[1].name]);
    assert.ok((await every({ q: 'holdfast/owner' })).includes(made[3].name));
    assert.deepEqual(await every({ q: tag.toUpperCase() }), newestFirst(), 'also by label value, in any case');
  });

  it('trims, and does nothing when too short', async () => {
    assert.deepEqual(await every({ q: `  ${made[0].name} ` }), [made[0].name]);
    assert.equal((await every({ q: 'p' })).length, (await every()).length);
  });

  it('does not change the total', async () => {
    const [everything, one] = [await VolumeInstance.list(), await VolumeInstance.list({ q: made[0].name })];
    assert.equal(one.data.length, 1);
    assert.equal(one.meta.total, everything.meta.total);
  });

  it('too long is refused', async () => {
    await refused(VolumeInstance.list({ q: 'x'.repeat(201) }), 400);
  });
});

describe('the filter by status', () => {
  it('takes a list, in any case', async () => {
    assert.deepEqual(await every({ q: tag, status: 'deployed,FAILED' }), newestFirst());
    assert.deepEqual(await every({ q: tag, status: 'FAILED,DELETING' }), []);
  });

  it('refuses a status that does not exist', async () => {
    await refused(VolumeInstance.list({ status: 'HAPPY' }), 400);
  });
});

describe('a cursor', () => {
  const query = { q: tag, sort: 'name:asc', limit: 2 };

  it('can be used again, and with another limit', async () => {
    const { nextCursor: cursor } = await VolumeInstance.list(query);
    assert.deepEqual(names((await VolumeInstance.list({ ...query, cursor })).data), byName().slice(2, 4));
    assert.deepEqual(names((await VolumeInstance.list({ ...query, cursor })).data), byName().slice(2, 4));
    assert.deepEqual(names((await VolumeInstance.list({ ...query, limit: 50, cursor })).data), byName().slice(2));
  });

  it('belongs to its query', async () => {
    const { nextCursor: cursor } = await VolumeInstance.list(query);
    for (const other of [{ sort: 'name:desc' }, { sort: undefined }, { q: `${tag}-` }, { q: undefined }, { status: 'DEPLOYED' }]) {
      await refused(VolumeInstance.list({ ...query, ...other, cursor }), 400);
    }
  });

  it('that nobody gave out is refused', async () => {
    const { nextCursor } = await VolumeInstance.list(query);
    const changed = nextCursor.slice(0, -4) + (nextCursor.endsWith('AAAA') ? 'BBBB' : 'AAAA');
    for (const cursor of ['x', '!!', Buffer.from('{"name":"a"}').toString('base64url'), changed, nextCursor.slice(1)]) {
      await refused(VolumeInstance.list({ ...query, cursor }), 400);
    }
  });
});
