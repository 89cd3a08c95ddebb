// A plain USTAR archive (POSIX.1-2017, pax, "ustar Interchange Format") of small files.
const BLOCK = 512;

function header(name, size, directory) {
  const block = Buffer.alloc(BLOCK);
  const octal = (value, at, length) => block.write(`${value.toString(8).padStart(length - 1, '0')}\0`, at, 'latin1');
  block.write(name, 0, 100, 'utf8');
  octal(directory ? 0o755 : 0o644, 100, 8); // mode
  octal(1000, 108, 8); // uid
  octal(1000, 116, 8); // gid
  octal(size, 124, 12);
  octal(1_750_000_000, 136, 12); // mtime
  block.write(' '.repeat(8), 148, 'latin1'); // the checksum counts itself as blanks
  block.write(directory ? '5' : '0', 156, 'latin1');
  block.write('ustar\x0000', 257, 'latin1');
  octal(block.reduce((sum, byte) => sum + byte, 0), 148, 7);
  return block;
}

/** tar({'dir/': null, 'dir/file': 'text'}): directories end in a slash. */
export function tar(tree) {
  const parts = [];
  for (const [name, content] of Object.entries(tree)) {
    const body = Buffer.from(content ?? '');
    parts.push(header(name, body.length, name.endsWith('/')), body, Buffer.alloc(-body.length & (BLOCK - 1)));
  }
  return Buffer.concat([...parts, Buffer.alloc(2 * BLOCK)]);
}
