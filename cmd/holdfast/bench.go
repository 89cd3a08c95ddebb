package main

import (
	"context"
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
	return group("bench", "Measure what is claimed, beside what one would do instead", a.benchLifecycle(), a.benchAttach(), a.benchTemplates(), a.benchPush(), a.benchLimits())
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
			return runBench(cmd, "lifecycle", l.Dir, out, func(ctx context.Context, work string) (bench.Report, error) {
				l.Dir = work
				return l.Run(ctx)
			})
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

func (a *app) benchAttach() *cobra.Command {
	at := bench.Attach{}
	var out string
	c := &cobra.Command{
		Use: "attach", Short: "Attach and detach with 1, 100 and 1,000 live attachments", Args: cobra.NoArgs,
		Long: "Measure attachments to directories of the host and to running containers through the API of a daemon\n" +
			"of its own, beside mount -o loop and umount by hand in the same rounds, and write attach-bench.json and\n" +
			"attach-bench.md. Needs root, runc and about 10 GB of disk.",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if at.Daemon, err = daemonProgram(at.Daemon); err != nil {
				return err
			}
			at.Log = cmd.ErrOrStderr()
			return runBench(cmd, "attach-bench", at.Dir, out, func(ctx context.Context, work string) (bench.Report, error) {
				at.Dir = work
				return at.Run(ctx)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&at.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&at.Rounds, "rounds", 60, "rounds of each measure")
	f.BoolVar(&at.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&at.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	return c
}

func (a *app) benchPush() *cobra.Command {
	p := bench.Pushes{}
	var out string
	c := &cobra.Command{
		Use: "push", Short: "Push a tree, unchanged, and with 1 % changed", Args: cobra.NoArgs,
		Long: "Measure what pushes of a tree take on the wire and in time, with a daemon of its own, and write\n" +
			"push-bench.json and push-bench.md. Needs root and about 10 GB of disk.",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if p.Daemon, err = daemonProgram(p.Daemon); err != nil {
				return err
			}
			p.Log = cmd.ErrOrStderr()
			return runBench(cmd, "push-bench", p.Dir, out, func(ctx context.Context, work string) (bench.Report, error) {
				p.Dir = work
				return p.Run(ctx)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&p.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&p.Rounds, "rounds", 5, "rounds of each measure")
	f.BoolVar(&p.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&p.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	return c
}

func (a *app) benchTemplates() *cobra.Command {
	t := bench.Templates{}
	var out string
	c := &cobra.Command{
		Use: "templates", Short: "From an upload to READY, creates from it, and what many revisions occupy", Args: cobra.NoArgs,
		Long: "Measure uploads of templates through the API of a daemon of its own, beside tar x and mkfs.ext4 -d on the\n" +
			"same file system in the same rounds, creates from templates of very different sizes, and the space of\n" +
			"ten revisions, and write templates-bench.json and templates-bench.md. Needs root and about 45 GB of disk\n" +
			"(6 GB with --quick).",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if t.Daemon, err = daemonProgram(t.Daemon); err != nil {
				return err
			}
			t.Log = cmd.ErrOrStderr()
			return runBench(cmd, "templates-bench", t.Dir, out, func(ctx context.Context, work string) (bench.Report, error) {
				t.Dir = work
				return t.Run(ctx)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&t.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&t.Rounds, "rounds", 100, "rounds of the creates; of the uploads a twentieth")
	f.BoolVar(&t.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&t.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	return c
}

// runBench runs a bench in a directory of its own and writes NAME.json and NAME.md.
func runBench(cmd *cobra.Command, name, dir, out string, measure func(ctx context.Context, work string) (bench.Report, error)) error {
	work, err := os.MkdirTemp(dir, "holdfast-bench-")
	if err != nil {
		return err
	}
	report, err := measure(cmd.Context(), work)
	if err != nil {
		return fmt.Errorf("%w (the daemon's log is in %s)", err, work)
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	for name, write := range map[string]func(*os.File) error{
		name + ".json": func(f *os.File) error { return report.JSON(f) },
		name + ".md":   func(f *os.File) error { return report.Markdown(f) },
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
