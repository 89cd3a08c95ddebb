package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"holdfast/bench"
)

func (a *app) benchLimits() *cobra.Command {
	l := bench.Limits{}
	var out string
	c := &cobra.Command{
		Use: "limits", Short: "How well an attachment's rate limits hold", Args: cobra.NoArgs,
		Long: "Measure what fio gets from a limited volume in a running container, direct and through the page cache,\n" +
			"beside what was asked for, and write limits.json and limits.md. Needs root, runc, fio and 3 GB of disk.",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if l.Daemon, err = daemonProgram(l.Daemon); err != nil {
				return err
			}
			l.Log = cmd.ErrOrStderr()
			return runBench(cmd, "limits", l.Dir, out, func(ctx context.Context, work string) (bench.Report, error) {
				l.Dir = work
				return l.Run(ctx)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&l.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&l.Rounds, "rounds", 3, "rounds of each measure")
	f.DurationVar(&l.Each, "time", 5*time.Second, "of each measure")
	f.BoolVar(&l.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&l.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	return c
}
