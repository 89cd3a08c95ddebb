// One line of JSON for every test that ended, for the Go test that runs us.
import { inspect } from 'node:util';

export default async function* reporter(events) {
  for await (const { type, data } of events) {
    if (type !== 'test:pass' && type !== 'test:fail') continue;
    const failed = type === 'test:fail';
    const error = data.details?.error;
    yield `${JSON.stringify({
      name: data.name,
      suite: data.details?.type === 'suite',
      failed,
      skipped: data.skip !== undefined || data.todo !== undefined,
      ms: data.details?.duration_ms ?? 0,
      error: failed ? inspect(error?.cause ?? error, { depth: 6 }) : '',
    })}\n`;
  }
}
