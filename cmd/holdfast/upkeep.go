package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

// ofVolume is a command about one volume, which it asks the server about.
func (a *app) ofVolume(use, short string, run func(ctx context.Context, cl *client.Client, name string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			return run(cmd.Context(), cl, args[0])
		},
	}
}

func (a *app) volumeStats() *cobra.Command {
	c := a.ofVolume("stats NAME", "Show how full a volume is and what went through its device", func(ctx context.Context, cl *client.Client, name string) error {
		s, err := cl.Stats(ctx, name)
		if err != nil {
			return err
		}
		return a.show(s, func(r *rows) { statsRows(r, s) })
	})
	c.Aliases = []string{"df"}
	return c
}

func statsRows(r *rows, s client.Stats) {
	r.add("State", s.State)
	if !s.FrozenUntil.IsZero() {
		r.add("Frozen until", s.FrozenUntil)
	}
	if u := s.Filesystem; u != nil {
		r.add("Used", fmt.Sprintf("%s of %s (%s)", bytesize.Human(u.Used), bytesize.Human(u.Total), percent(u.Used, u.Total)))
		r.add("Free", bytesize.Human(u.Free))
		if u.Inodes > 0 {
			r.add("Inodes", fmt.Sprintf("%d of %d (%s)", u.UsedInodes, u.Inodes, percent(u.UsedInodes, u.Inodes)))
		}
		r.add("Source", u.Source)
		if u.Unclean {
			r.add("Unclean", "not unmounted: the numbers are those of before its recovery")
		}
	} else {
		r.add("Used", "unknown: "+s.Unknown)
	}
	r.add("Device", bytesize.Human(s.Device))
	r.add("Allocated", fmt.Sprintf("%s (%s shared)", bytesize.Human(s.Allocated), bytesize.Human(s.Shared)))
	if n := s.IO; n != nil {
		r.add("Device open since", n.Since)
		r.add("Read", fmt.Sprintf("%s in %d requests", bytesize.Human(n.ReadBytes), n.Reads))
		r.add("Written", fmt.Sprintf("%s in %d requests, %d flushes", bytesize.Human(n.WriteBytes), n.Writes, n.Flushes))
		r.add("Discarded", fmt.Sprintf("%s in %d requests", bytesize.Human(n.DiscardBytes), n.Discards))
	}
}

func percent(part, whole int64) string {
	if whole <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

func (a *app) volumeTrim() *cobra.Command {
	return a.ofVolume("trim NAME", "Give the space of deleted files back to the pool", func(ctx context.Context, cl *client.Client, name string) error {
		t, err := cl.Trim(ctx, name)
		if err != nil {
			return err
		}
		return a.show(t, func(r *rows) {
			r.add("Freed", bytesize.Human(t.Freed))
			r.add("Discarded", bytesize.Human(t.Discarded))
			if !t.Complete {
				r.add("Not complete", t.Reason)
			}
		})
	})
}

func (a *app) volumeFreeze() *cobra.Command {
	var timeout time.Duration
	c := a.ofVolume("freeze NAME", "Hold all writes to an attached volume, until it is thawed or the time is over", func(ctx context.Context, cl *client.Client, name string) error {
		s, err := cl.Freeze(ctx, name, timeout)
		if err != nil {
			return err
		}
		return a.show(s, func(r *rows) { r.add("Frozen until", s.Until) })
	})
	c.Flags().DurationVar(&timeout, "timeout", 0, "thawed after this time by itself (default: 10s)")
	return c
}

func (a *app) volumeThaw() *cobra.Command {
	return a.ofVolume("thaw NAME", "Let a frozen volume go on", func(ctx context.Context, cl *client.Client, name string) error {
		s, err := cl.Thaw(ctx, name)
		if err != nil {
			return err
		}
		if a.output != formatTable {
			return a.show(s, nil)
		}
		if s.WasFrozen {
			a.done("volume %s thawed", name)
		} else {
			a.done("volume %s was not frozen (any more)", name)
		}
		return nil
	})
}

func (a *app) volumeCapture() *cobra.Command {
	var version string
	c := &cobra.Command{
		Use: "capture VOLUME TEMPLATE", Short: "Make a template version of what a volume holds, also while it is in use", Args: cobra.ExactArgs(2),
		Long: "Make a version of a template of what a volume holds, also while it is in use: its writers are held\n" +
			"for some milliseconds. The template is made if it is not there.",
		Example:           "  holdfast volume capture work toolchain",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			made, err := cl.Capture(cmd.Context(), args[0], args[1], version)
			if err != nil {
				return err
			}
			return a.show(made, func(r *rows) {
				r.add("Version", made.Version.TemplateName+":"+made.Version.Name)
				r.add("Status", made.Version.Status)
				r.add("Content", bytesize.Human(made.Version.ContentSize))
				r.add("Writes held for", fmt.Sprintf("%.1f ms", made.FrozenMilliseconds))
				if skipped := made.SkippedDevices + made.SkippedPipes; skipped > 0 {
					r.add("Left out", fmt.Sprintf("%d devices, %d pipes and sockets", made.SkippedDevices, made.SkippedPipes))
				}
			})
		},
	}
	c.Flags().StringVar(&version, "version", "", "name of the version (default: its number)")
	return c
}
