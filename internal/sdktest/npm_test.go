package sdktest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"holdfast/blockdev/blockdevtest"
)

const (
	root     = "../.." // of the module
	packages = "testdata/ts"
	// installing 250 packages takes half a minute when npm's cache is warm.
	npmPatience = 10 * time.Minute
)

// nodeModules gives the directory with the packages of the lock file, and
// installs them when this lock file's are not there yet. They stay in .cache: a
// directory is complete, because it gets its name when npm is through, and
// another lock file is another directory.
func nodeModules(t *testing.T) string {
	t.Helper()
	blockdevtest.Require(t, blockdevtest.SDK, blockdevtest.NPM)
	cache, err := filepath.Abs(filepath.Join(root, ".cache", "sdk"))
	must(t, err)
	dir := filepath.Join(cache, lockDigest(t))
	modules := filepath.Join(dir, "node_modules")
	if _, err := os.Stat(modules); err == nil {
		return modules
	}
	must(t, os.MkdirAll(cache, 0o755))
	fresh, err := os.MkdirTemp(cache, "install-")
	must(t, err)
	defer os.RemoveAll(fresh)
	install(t, fresh)
	must(t, os.Chmod(fresh, 0o755))
	err = os.Rename(fresh, dir)
	if errors.Is(err, fs.ErrExist) {
		return modules // another test run was faster
	}
	must(t, err)
	return modules
}

// lockDigest names the packages: their lock file has the SHA-512 of each.
func lockDigest(t *testing.T) string {
	t.Helper()
	sum := sha256.New()
	for _, name := range []string{"package.json", "package-lock.json"} {
		b, err := os.ReadFile(filepath.Join(packages, name))
		must(t, err)
		sum.Write(b)
	}
	return hex.EncodeToString(sum.Sum(nil)[:8])
}

// install has npm fetch exactly what the lock file says. No package's own scripts
// run.
func install(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"package.json", "package-lock.json"} {
		b, err := os.ReadFile(filepath.Join(packages, name))
		must(t, err)
		must(t, os.WriteFile(filepath.Join(dir, name), b, 0o644))
	}
	ctx, cancel := context.WithTimeout(t.Context(), npmPatience)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline")
	npm.Dir = dir
	var out bytes.Buffer
	npm.Stdout, npm.Stderr = &out, &out
	if err := npm.Run(); err != nil {
		t.Fatalf("npm ci: %v (waive with %s=%s)\n%s", err, blockdevtest.SkipVariable, blockdevtest.NPM, &out)
	}
}
