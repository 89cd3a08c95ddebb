package demo

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"

	"holdfast/internal/run"
)

const oddName = "café-日本語-🚀.txt"

// makeTree copies a real tree and adds what real trees have and archives lose.
func makeTree(ctx context.Context, dir, source string) (from string, err error) {
	if source == "" {
		source = realTree(ctx)
	}
	if err := os.MkdirAll(filepath.Join(dir, "odd names"), 0o755); err != nil {
		return "", err
	}
	if _, err := run.Run(ctx, run.Cmd{Args: []string{"cp", "-a", "--", source, filepath.Join(dir, "src")}}); err != nil {
		return "", err
	}
	return source, addOddities(dir)
}

// realTree finds thousands of files that are on every machine that can build us.
func realTree(ctx context.Context) string {
	found, err := run.Run(ctx, run.Cmd{Args: []string{"go", "env", "GOROOT"}})
	if err == nil {
		src := filepath.Join(oneLine(string(found.Stdout)), "src")
		if _, err := os.Stat(src); err == nil {
			return src
		}
	}
	if src := filepath.Join(runtime.GOROOT(), "src"); runtime.GOROOT() != "" { //nolint:staticcheck // the build's own toolchain is exactly what is meant
		if _, err := os.Stat(src); err == nil {
			return src
		}
	}
	return "/usr/share/doc"
}

func addOddities(dir string) error {
	odd := filepath.Join(dir, "odd names")
	var failures error
	for name, text := range map[string]string{oddName: "unicode\n", "--help": "a leading dash\n", "with space": "a space\n", ".hidden": "a dot\n"} {
		failures = errors.Join(failures, os.WriteFile(filepath.Join(odd, name), []byte(text), 0o640))
	}
	return errors.Join(failures,
		os.Symlink("../src", filepath.Join(odd, "link to a directory")),
		os.Symlink("/nowhere/at/all", filepath.Join(odd, "dangling link")),
		os.Link(filepath.Join(odd, oddName), filepath.Join(odd, "hard link")),
		os.Mkdir(filepath.Join(odd, "empty directory"), 0o700),
		os.Chmod(filepath.Join(odd, "--help"), 0o4755),
		os.Chown(filepath.Join(odd, "with space"), 12345, 54321))
}
