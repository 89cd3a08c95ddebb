package sparse

import (
	"errors"
	"io"
	"os"

	"holdfast/blockdev/envelope"
)

// readEnvelope reads and verifies the envelope in a file. fs.ErrNotExist when it
// is not there.
func readEnvelope(path, of string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sealed, err := io.ReadAll(io.LimitReader(f, envelope.MaxSealed))
	if err != nil {
		return nil, err
	}
	return envelope.Unseal(of, sealed)
}

// replaceEnvelope durably and atomically makes dir/name an envelope.
func (p *Pool) replaceEnvelope(dir, name, of string, payload []byte) error {
	sealed, err := envelope.Seal(of, payload)
	if err != nil {
		return err
	}
	path, fresh := dir+"/"+name, dir+"/"+name+".new"
	if err := writeFile(fresh, sealed); err != nil {
		return err
	}
	if err := p.at("describe.rename"); err != nil {
		return err
	}
	if err := os.Rename(fresh, path); err != nil {
		return noSpace(err)
	}
	if err := p.at("describe.flush"); err != nil {
		return err
	}
	return syncDir(dir)
}

// writeFile makes a file with this content, in the place of an older one, and
// flushes it.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return noSpace(err)
	}
	_, err = f.Write(content)
	if err == nil {
		err = syncFile(f)
	}
	return noSpace(errors.Join(err, f.Close()))
}
