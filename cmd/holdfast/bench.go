package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"holdfast/bench"
	"holdfast/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	o := demo.Options{}
	c := &cobra.Command{
		Use: "demo", Short: "Show the whole job once, on real input, and clean up", Args: cobra.NoArgs,
		Long: "Start a daemon of its own, make a template of a real directory tree, give a volume of it to a\n" +
			"running container, destroy the container, give the volume to another one, grow it while it is\n" +
			"mounted, delete it, and take everything away again. Needs root and runc.",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Daemon, err = daemonProgram(o.Daemon); err != nil {
				return err
			}
			o.Out = cmd.OutOrStdout()
			return demo.Run(cmd.Context(), o)
		},
	}
	c.Flags().StringVar(&o.Daemon, "daemon", "", "the holdfastd to use (default: beside this program)")
	c.Flags().StringVar(&o.Source, "source", "", "directory to make the template of (default: Go's own sources)")
	return c
}

func (a *app) benchCommand() *cobra.Command {
	return group("bench", "Measure what is claimed, beside what one would do instead", a.benchLifecycle())
}

func (a *app) benchLifecycle() *cobra.Command {
	l := bench.Lifecycle{}
	var out string
	c := &cobra.Command{
		Use: "lifecycle", Short: "Create, list, grow, and an idle daemon", Args: cobra.NoArgs,
		Long: "Measure the life cycle of volumes through the API of a daemon of its own, beside its yardsticks\n" +
			"in the same rounds, and write lifecycle.json and lifecycle.md. Needs root and about 30 GB of disk\n" +
			"(3 GB with --quick).",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if l.Daemon, err = daemonProgram(l.Daemon); err != nil {
				return err
			}
			l.Log = cmd.ErrOrStderr()
			return runLifecycle(cmd, l, out)
		},
	}
	f := c.Flags()
	f.StringVar(&l.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&l.Rounds, "rounds", 100, "rounds of each measure")
	f.BoolVar(&l.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&l.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	return c
}

func runLifecycle(cmd *cobra.Command, l bench.Lifecycle, out string) (err error) {
	work, err := os.MkdirTemp(l.Dir, "holdfast-bench-")
	if err != nil {
		return err
	}
	l.Dir = work
	report, err := l.Run(cmd.Context())
	if err != nil {
		return fmt.Errorf("%w (the daemon's log is in %s)", err, work)
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	for name, write := range map[string]func(*os.File) error{
		"lifecycle.json": func(f *os.File) error { return report.JSON(f) },
		"lifecycle.md":   func(f *os.File) error { return report.Markdown(f) },
	} {
		f, err := os.Create(filepath.Join(out, name))
		if err != nil {
			return err
		}
		if err := errors.Join(write(f), f.Close()); err != nil {
			return err
		}
	}
	if err := report.Markdown(cmd.OutOrStdout()); err != nil {
		return err
	}
	if missed := report.Missed(); missed > 0 {
		return fmt.Errorf("%d goals are missed", missed)
	}
	return nil
}

// daemonProgram finds the daemon that belongs to this program.
func daemonProgram(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(self), "holdfastd")
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w: build it, or name it with --daemon", err)
	}
	return path, nil
}
