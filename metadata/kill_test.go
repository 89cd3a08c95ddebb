package metadata

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

const writerDir = "METADATA_TEST_WRITER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		fmt.Fprintln(os.Stderr, write4ever(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// write4ever commits and logs, from several goroutines, and tells on stdout what
// was acknowledged, until it is killed.
func write4ever(dir string) error {
	s, err := Open(filepath.Join(dir, "store"), Options{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return err
	}
	l, err := OpenSideLog(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	round := os.Getpid()
	errs := make(chan error)
	for g := range 6 {
		go func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d-%d-%d", round, g, i)
				var err error
				if g == 0 {
					err = l.Append("key", key, thing{key, i})
				} else {
					err = s.Update(context.Background(), func(tx *Tx) error {
						return errors.Join(things.Put(tx, key, thing{strings.Repeat("x", rand.IntN(6000)), i}), others.Put(tx, key, thing{key, i}))
					})
				}
				if err == nil {
					err = stillThere(filepath.Join(dir, "log"))
				}
				if err != nil {
					errs <- err
					return
				}
				fmt.Println(key)
			}
		}()
	}
	return <-errs
}

// A writer is killed at a random moment, again and again, on one directory:
// whatever it acknowledged is there, whole.
func TestKilledWriterLosesNothing(t *testing.T) {
	dir := t.TempDir()
	acknowledged := map[string]bool{}
	for round := range 25 {
		killWriter(t, dir, rand.IntN(600), acknowledged)
		checkAcknowledged(t, dir, round, acknowledged)
	}
	t.Logf("%d acknowledged", len(acknowledged))
	if len(acknowledged) < 100 {
		t.Fatalf("only %d acknowledged: the writer did not write", len(acknowledged))
	}
}

// stillThere is an error once the filesystem has been cut off. A sync that began
// before can answer success after it: ext4 asks only whether the transaction is
// still under way, and one that was dropped is not (fs/jbd2/journal.c,
// jbd2_complete_transaction). No disk does that, so such an answer does not count.
func stillThere(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	return f.Close()
}

// startWriter runs write4ever in a process of its own; what it acknowledges comes
// out of out.
func startWriter(t *testing.T, dir string) (cmd *exec.Cmd, out io.Reader, stderr *strings.Builder) {
	t.Helper()
	cmd, stderr = exec.Command(os.Args[0]), &strings.Builder{}
	cmd.Env = append(os.Environ(), writerDir+"="+dir)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return cmd, out, stderr
}

func killWriter(t *testing.T, dir string, after int, acknowledged map[string]bool) {
	t.Helper()
	cmd, out, stderr := startWriter(t, dir)
	kill := sync.OnceFunc(func() { _ = cmd.Process.Kill() })
	defer kill()
	if after < 60 { // also while it opens
		timer := time.AfterFunc(time.Duration(after)*4*time.Millisecond, kill)
		defer timer.Stop()
	}
	lines := bufio.NewScanner(out)
	n := 0
	for lines.Scan() {
		acknowledged[lines.Text()] = true
		if n++; n == after {
			kill()
		}
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the writer ended by itself: %v\n%s", err, stderr.String())
	}
}

func checkAcknowledged(t *testing.T, dir string, round int, acknowledged map[string]bool) {
	t.Helper()
	s, err := Open(filepath.Join(dir, "store"), Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	defer s.Close()
	l, err := OpenSideLog(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	defer l.Close()
	logged := contents(t, l, "key")
	err = s.View(func(tx *Tx) error {
		for key := range acknowledged {
			if strings.Split(key, "-")[1] == "0" {
				if logged[key] == "" {
					t.Errorf("round %d: the side log lost %s", round, key)
				}
				continue
			}
			_, err1 := things.Get(tx, key)
			_, err2 := others.Get(tx, key)
			if err1 != nil || err2 != nil {
				t.Errorf("round %d: %v, %v", round, err1, err2)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
