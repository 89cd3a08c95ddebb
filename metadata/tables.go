package metadata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/ristretto/v2/z"
)

// checkTables reads every table that the manifest names. Badger does the same
// when it opens, but on goroutines of its own, where a table that was cut is a
// panic that nobody can catch: the process would die at every start and say
// nothing that helps.
func checkTables(dir string, o badger.Options) error {
	manifest, err := os.Open(filepath.Join(dir, badger.ManifestFilename))
	if errors.Is(err, os.ErrNotExist) {
		return checkEmpty(dir)
	}
	if err != nil {
		return err
	}
	m, _, err := badger.ReplayManifestFile(manifest, 0, o)
	if err = errors.Join(err, manifest.Close()); err != nil {
		return fmt.Errorf("manifest: %w: %w", ErrDamaged, err)
	}
	for id := range m.Tables {
		if err := checkTable(table.NewFilename(id, dir)); err != nil {
			return fmt.Errorf("table %d: %w: %w", id, ErrDamaged, err)
		}
	}
	return nil
}

func checkTable(path string) (err error) {
	file, err := z.OpenMmapFile(path, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = errors.Join(fmt.Errorf("not a table: %v", p), file.Close(-1))
		}
	}()
	t, err := table.OpenTable(file, table.Options{ReadOnly: true, ChkMode: options.OnTableRead})
	if err != nil {
		return err // OpenTable has closed the file
	}
	return t.Close(-1)
}

// checkEmpty: without a manifest Badger takes the store for a new one and
// removes the tables, which are then not even there to be looked at.
func checkEmpty(dir string) error {
	for _, pattern := range []string{"*.sst", "*.mem"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		if len(found) > 0 {
			return fmt.Errorf("%w: no manifest, but %s", ErrDamaged, filepath.Base(found[0]))
		}
	}
	return nil
}
