package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"holdfast/bench"
	"holdfast/internal/demo"
)

func (a *app) demoCommand() *cobra.Command {
	o := demo.Options{}
	show, machines := demo.Run, false
	c := &cobra.Command{
		Use: "demo", Short: "Show the whole job once, on real input, and clean up", Args: cobra.NoArgs,
		Long: "Start a daemon of its own, make a template of a real directory tree, give a volume of it to a\n" +
			"running container, destroy the container, give the volume to another one, grow it while it is\n" +
			"mounted, delete it, and take everything away again. Needs root and runc.\n\n" +
			"With --vm the sandboxes are virtual machines: two guests are booted, and the volume is plugged into\n" +
			"the first while it runs, mounted, written, grown and unplugged there, and read in the second. Needs\n" +
			"root, QEMU and a clone of the project, from which the guests are made.",
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if o.Daemon, err = daemonProgram(o.Daemon); err != nil {
				return err
			}
			o.Out = cmd.OutOrStdout()
			if machines {
				show = demo.RunMachines
			}
			return show(cmd.Context(), o)
		},
	}
	c.Flags().StringVar(&o.Daemon, "daemon", "", "the holdfastd to use (default: beside this program)")
	c.Flags().BoolVar(&machines, "vm", false, "with virtual machines instead of containers")
	c.Flags().StringVar(&o.Source, "source", "", "directory to make the template of (default: Go's own sources)")
	return c
}

func (a *app) benchCommand() *cobra.Command {
	l := &bench.Limits{}
	limits := measure(l, "limits", "limits", 3, "How well an attachment's rate limits hold",
		"Measure what fio gets from a limited volume in a running container, direct and through the page cache,\n"+
			"beside what was asked for, and write limits.json and limits.md. Needs root, runc, fio and 3 GB of disk.")
	limits.Flags().DurationVar(&l.Each, "time", 5*time.Second, "of each measure")
	return group("bench", "Measure what is claimed, beside what one would do instead",
		measure(&bench.Lifecycle{}, "lifecycle", "lifecycle", 100, "Create, list, grow, and an idle daemon",
			"Measure the life cycle of volumes through the API of a daemon of its own, beside its yardsticks\n"+
				"in the same rounds, and write lifecycle.json and lifecycle.md. Needs root and about 30 GB of disk\n"+
				"(3 GB with --quick)."),
		measure(&bench.Attach{}, "attach", "attach-bench", 60, "Attach and detach with 1, 100 and 1,000 live attachments",
			"Measure attachments to directories of the host and to running containers through the API of a daemon\n"+
				"of its own, beside mount -o loop and umount by hand in the same rounds, and write attach-bench.json and\n"+
				"attach-bench.md. Needs root, runc and about 10 GB of disk."),
		measure(&bench.Templates{}, "templates", "templates-bench", 100, "From an upload to READY, creates from it, and what many revisions occupy",
			"Measure uploads of templates through the API of a daemon of its own, beside tar x and mkfs.ext4 -d on the\n"+
				"same file system in the same rounds, creates from templates of very different sizes, and the space of\n"+
				"ten revisions, and write templates-bench.json and templates-bench.md. Needs root and about 45 GB of disk\n"+
				"(6 GB with --quick). Uploads are measured in a twentieth of the rounds."),
		measure(&bench.Pushes{}, "push", "push-bench", 5, "Push a tree, unchanged, and with 1 % changed",
			"Measure what pushes of a tree take on the wire and in time, with a daemon of its own, and write\n"+
				"push-bench.json and push-bench.md. Needs root and about 10 GB of disk."),
		measure(&bench.Overlay{}, "overlay", "overlay-bench", 15, "Copy-on-write in layers, snapshots and hydration",
			"Measure reads, rewrites, first writes and snapshots of a volume in layers beside a plain file and the\n"+
				"file system's clones in the same rounds, and hydration from a store on this host, and write\n"+
				"overlay-bench.json and overlay-bench.md. Needs root and about 10 GB of disk."),
		limits,
		measure(&bench.VM{}, "vm", "vm-bench", 30, "Attach, grow and detach in a real guest, and its I/O",
			"Measure hot attach, growth and detach of volumes in a guest through the API of a daemon of its own, beside\n"+
				"the same by hand on the guest's monitor in the same rounds, 32 volumes in one machine, and fio in the guest\n"+
				"over a file, a loop device and a thin volume, and write vm-bench.json and vm-bench.md. Needs root, QEMU\n"+
				"and a clone of the project."),
		measure(&bench.Worker{}, "worker", "worker-bench", 1, "What an idle worker costs",
			"Measure the CPU and the memory of servers of ours that have done some work and are asked for nothing, beside\n"+
				"qemu-storage-daemon and qemu-nbd, and write worker-bench.json and worker-bench.md. Needs fio and 1 GB of disk."),
		lvmBench(), ioBench(), compareBench(), pageOfBenches())
}

// ioBench starts itself again as the servers that it measures.
func ioBench() *cobra.Command {
	b := &bench.IO{}
	c := measure(b, "io", "io-bench", 15, "The paths to a volume's bytes, beside the raw file and other servers",
		"Measure what a client gets of our vhost-user-blk and NBD servers, beside the same file without a server and\n"+
			"others' servers in the same rounds, and write io-bench.json and io-bench.md. Needs fio and 1 GB of disk (on a\n"+
			"file system that has direct I/O); peers (qemu-nbd, qemu-storage-daemon, nbdkit) that are not installed are left out.\n\n"+
			"With --guest fio runs in an emulated guest: on its disk by our worker and by qemu-storage-daemon over\n"+
			"vhost-user-blk and by QEMU itself, and on the kernel's NBD client in it. The reports are io-guest-bench.json and\n"+
			"io-guest-bench.md. Needs root, QEMU and a clone of the project.")
	f := c.Flags()
	f.DurationVar(&b.Each, "each", 0, "of each job on each path in each round (default 500ms, with --guest 300ms)")
	f.StringVar(&b.Only, "only", "", "jobs whose names contain one of these, separated by commas")
	f.BoolVar(&b.Guest, "guest", false, "the paths to the disks of a guest, instead")
	f.StringVar(&b.Paths, "paths", "", "paths to measure, separated by commas (default: all; a wrong one lists them)")
	o := bench.ServeOptions{}
	f.StringVar(&o.Image, "serve", "", "serve this image")
	f.StringVar(&o.Layer, "layer", "", "as the base of this layer")
	f.StringVar((*string)(&o.Kind), "kind", "", "as this kind of thing")
	f.StringVar(&o.Device, "device", "", "and connect this device of the kernel's NBD client to it")
	f.StringVar(&o.Certificates, "certificates", "", "and over TLS, with the certificates in this directory")
	for _, hidden := range []string{"serve", "layer", "kind", "device", "certificates"} {
		_ = f.MarkHidden(hidden) // it is there
	}
	outside := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if o.Image != "" {
			return o.Serve(cmd.Context(), cmd.OutOrStdout())
		}
		if b.Guest {
			return guestBench(cmd, b)
		}
		return outside(cmd, args)
	}
	return c
}

// guestBench is ioBench's measure of a guest's disks: a report of its own, without goals.
func guestBench(cmd *cobra.Command, b *bench.IO) error {
	out, err := cmd.Flags().GetString("out")
	if err != nil {
		return err
	}
	b.Log = cmd.ErrOrStderr()
	return runBench(cmd, "io-guest-bench", out, true, b)
}

// compareBench takes two reports or two commits.
func compareBench() *cobra.Command {
	c := &bench.Commits{}
	measured := measure(c, "compare A B", "compare", 15, "What has changed between two reports, or between two commits",
		"Hold a report (JSON) against an earlier one; or build two commits of the repository in the working directory\n"+
			"and measure their vhost-user-blk and NBD servers in the same rounds. Write compare.json and compare.md. A verdict is\n"+
			"given for each row: better, worse, or no difference shown.")
	measured.Args = cobra.ExactArgs(2)
	f := measured.Flags()
	f.DurationVar(&c.Each, "each", 500*time.Millisecond, "of each job on each path in each round")
	f.StringVar(&c.Only, "only", "randread-4k,randwrite-4k", "jobs whose names contain one of these, separated by commas (of commits)")
	outside := measured.RunE
	measured.RunE = func(cmd *cobra.Command, args []string) error {
		if _, err := os.Stat(args[0]); err != nil {
			c.A, c.B = args[0], args[1]
			return outside(cmd, nil)
		}
		out, err := f.GetString("out")
		if err != nil {
			return err
		}
		earlier, err := bench.ReadReport(args[0])
		if err != nil {
			return err
		}
		later, err := bench.ReadReport(args[1])
		if err != nil {
			return err
		}
		return writeReports(cmd, "compare", out, bench.CompareReports(earlier, later))
	}
	return measured
}

func pageOfBenches() *cobra.Command {
	return &cobra.Command{
		Use: "page DIR", Short: "Make charts of the reports in a directory, and the tables of goals in its performance.md", Args: cobra.ExactArgs(1),
		Long: "Read io-bench.json, io-guest-bench.json, overlay-bench.json and worker-bench.json in a directory, write charts (SVG) there,\n" +
			"and rewrite what is between the marks in its performance.md. Measures nothing.",
		RunE: func(_ *cobra.Command, args []string) error { return bench.WritePage(args[0]) },
	}
}

// lvmBench starts itself again in a guest, where --inside names the disk to use.
func lvmBench() *cobra.Command {
	b := &bench.LVM{}
	c := measure(b, "lvm", "lvm-bench", 20, "What our backend adds to LVM, in a guest",
		"Measure images made, cloned, grown and removed in a thin pool of LVM, beside the plain commands on the same\n"+
			"pool in the same rounds, in a guest, and write lvm-bench.json and lvm-bench.md. Needs root, QEMU and a\n"+
			"clone of the project.")
	var disk string
	c.Flags().StringVar(&disk, "inside", "", "measure here, on this blank disk")
	_ = c.Flags().MarkHidden("inside") // it is there
	outside := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		if disk == "" {
			return outside(cmd, args)
		}
		b.Log = cmd.ErrOrStderr()
		report, err := b.Inside(cmd.Context(), disk)
		return errors.Join(err, report.JSON(cmd.OutOrStdout()))
	}
	return c
}

// measure is the command of one bench; its reports are called name.
func measure(b bench.Bench, use, name string, rounds int, short, long string) *cobra.Command {
	var out string
	var missedOK bool
	s := b.Given()
	c := &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if s.Daemon, err = daemonProgram(s.Daemon); err != nil {
				return err
			}
			s.Log = cmd.ErrOrStderr()
			return runBench(cmd, name, out, missedOK, b)
		},
	}
	f := c.Flags()
	f.StringVar(&s.Daemon, "daemon", "", "the holdfastd to measure (default: beside this program)")
	f.IntVar(&s.Rounds, "rounds", rounds, "rounds of each measure")
	f.BoolVar(&s.Quick, "quick", false, "less of everything: to see that the bench works")
	f.StringVar(&s.Dir, "dir", "", "directory to work in (default: a temporary one)")
	f.StringVar(&out, "out", ".", "directory for the reports")
	f.BoolVar(&missedOK, "missed-ok", false, "a goal that is missed is reported, and no failure")
	return c
}

// runBench runs a bench in a directory of its own and writes NAME.json and NAME.md.
func runBench(cmd *cobra.Command, name, out string, missedOK bool, b bench.Bench) error {
	if err := reportsGoTo(out); err != nil {
		return err
	}
	work, err := os.MkdirTemp(b.Given().Dir, "holdfast-bench-")
	if err != nil {
		return err
	}
	b.Given().Dir = work
	report, err := b.Run(cmd.Context())
	if err != nil {
		return fmt.Errorf("%w (the daemon's log is in %s)", err, work)
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	if err := writeReports(cmd, name, out, report); err != nil {
		return err
	}
	if missed := report.Missed(); missed > 0 && !missedOK {
		return fmt.Errorf("%d goals are missed", missed)
	}
	return nil
}

// reportsGoTo fails before a bench has taken its time where its reports cannot be
// written.
func reportsGoTo(out string) error {
	f, err := os.CreateTemp(out, ".holdfast-bench-")
	if err != nil {
		return fmt.Errorf("the reports cannot be written, give a directory with --out: %w", err)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// writeReports writes NAME.json and NAME.md, and shows the latter.
func writeReports(cmd *cobra.Command, name, out string, report bench.Report) error {
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
	return report.Markdown(cmd.OutOrStdout())
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
