package sparse

import (
	"errors"
	"io"
	"os"
	"sync"

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
	if err := p.renameEnvelope(dir, name, of, payload); err != nil {
		return err
	}
	if err := p.at("describe.flush"); err != nil {
		return err
	}
	return syncDir(dir)
}

// renameEnvelope is replaceEnvelope whose new name is not durable yet: that of a draft
// becomes so with its directory. What needs makes durable is so before.
func (p *Pool) renameEnvelope(dir, name, of string, payload []byte, needs ...func() error) error {
	sealed, err := envelope.Seal(of, payload)
	if err != nil {
		return err
	}
	path, fresh := dir+"/"+name, dir+"/"+name+freshFile
	if err := together(append(needs, func() error { return writeFile(fresh, sealed) })...); err != nil {
		return err
	}
	if err := p.at("describe.rename"); err != nil {
		return err
	}
	return noSpace(os.Rename(fresh, path))
}

// together does things at once, such as flushes: they share what the filesystem and the
// disk do for one.
func together(all ...func() error) error {
	errs := make([]error, len(all))
	var done sync.WaitGroup
	for i, one := range all[1:] {
		done.Go(func() { errs[i+1] = one() })
	}
	errs[0] = all[0]()
	done.Wait()
	return errors.Join(errs...)
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
