package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

func (a *app) snapshotCommand() *cobra.Command {
	c := group("snapshot", "Snapshots of volumes: take, look, delete", a.snapshotCreate(), a.snapshotList(), a.snapshotGet(), a.snapshotDelete())
	c.Aliases = []string{"snap", "snapshots"}
	return c
}

const snapshotNames = "A snapshot is named VOLUME/SNAPSHOT, or by its id, which is the only way once its volume is deleted."

// parseSnapshot reads VOLUME/SNAPSHOT or an id.
func parseSnapshot(text string) (volume, snapshot string, err error) {
	volume, snapshot, both := strings.Cut(text, "/")
	switch {
	case !both && strings.HasPrefix(text, "snp-"):
		return "", text, nil
	case !both || volume == "" || snapshot == "" || strings.Contains(snapshot, "/"):
		return "", "", usageError{fmt.Sprintf("%q is neither VOLUME/SNAPSHOT nor a snapshot's id", text)}
	}
	return volume, snapshot, nil
}

func (a *app) snapshotCreate() *cobra.Command {
	var s client.NewSnapshot
	var labels []string
	var idempotency string
	c := &cobra.Command{
		Use: "create VOLUME [NAME]", Short: "Keep what a volume holds now, also while it is in use", Args: cobra.RangeArgs(1, 2),
		Long: "Keep what a volume holds now, also while it is in use. It takes no longer for a larger volume.\n\n" +
			"With --consistency crash (the default) the snapshot holds what a disk does whose power fails: what was\n" +
			"flushed is there, and a journal recovers the rest. With filesystem all that was written to files is there:\n" +
			"the filesystem is flushed and frozen for the moment.",
		Example:           "  holdfast snapshot create work before-upgrade\n  holdfast volume create work-2 --snapshot work/before-upgrade",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) > 1 {
				s.Name = args[1]
			}
			if s.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			made, err := cl.CreateSnapshot(cmd.Context(), args[0], s, idempotency)
			if err != nil {
				return err
			}
			return a.showSnapshot(made)
		},
	}
	f := c.Flags()
	f.StringVar(&s.Consistency, "consistency", "", "crash (default) or filesystem")
	f.StringArrayVarP(&labels, "label", "l", nil, "KEY=VALUE; may be repeated")
	f.StringVar(&idempotency, "idempotency-key", "", "makes a repetition of this command give the same answer")
	_ = c.RegisterFlagCompletionFunc("consistency", cobra.FixedCompletions([]string{"crash", "filesystem"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) snapshotList() *cobra.Command {
	var labels []string
	c := &cobra.Command{
		Use: "ls [VOLUME]", Aliases: []string{"list"}, Short: "List the snapshots of a volume, or all", Args: cobra.MaximumNArgs(1),
		Long:              "List the snapshots of a volume, or all of the workspace, also those of deleted volumes.",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			wanted, err := parseLabels(labels)
			if err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			list := []client.Snapshot{}
			for s, err := range cl.Snapshots(cmd.Context(), strings.Join(args, ""), wanted) {
				if err != nil {
					return err
				}
				list = append(list, s)
			}
			return a.show(list, func(r *rows) {
				r.add("NAME", "ID", "SIZE", "PROMISED", "CONSISTENCY", "STATUS", "CREATED")
				for _, s := range list {
					r.add(s.Spec.Volume+"/"+s.Metadata.Name, s.Metadata.ID, mib(s.Spec.Size), bytesize.Human(s.State.Promised), s.Spec.Consistency, s.Status, s.Metadata.CreatedAt)
				}
			})
		},
	}
	c.Flags().StringArrayVarP(&labels, "label", "l", nil, "only those with this KEY=VALUE; may be repeated")
	return c
}

func (a *app) snapshotGet() *cobra.Command {
	return &cobra.Command{
		Use: "get SNAPSHOT", Short: "Show a snapshot", Args: cobra.ExactArgs(1), Long: "Show a snapshot. " + snapshotNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			volume, name, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			s, err := cl.Snapshot(cmd.Context(), volume, name)
			if err != nil {
				return err
			}
			return a.showSnapshot(s)
		},
	}
}

func (a *app) snapshotDelete() *cobra.Command {
	return &cobra.Command{
		Use: "rm SNAPSHOT...", Aliases: []string{"delete"}, Short: "Delete snapshots", Args: cobra.MinimumNArgs(1),
		Long: "Delete snapshots. Volumes that were made from them stay as they are. " + snapshotNames,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, text := range args {
				volume, name, err := parseSnapshot(text)
				if err != nil {
					return err
				}
				if _, err := cl.DeleteSnapshot(cmd.Context(), volume, name); err != nil {
					return err
				}
				a.done("snapshot %s deleted", text)
			}
			return nil
		},
	}
}

func (a *app) showSnapshot(s client.Snapshot) error {
	return a.show(s, func(r *rows) {
		r.add("Name", s.Spec.Volume+"/"+s.Metadata.Name)
		r.add("Id", s.Metadata.ID)
		r.add("Status", s.Status)
		if s.State.Failure != "" {
			r.add("Failure", s.State.Failure)
		}
		r.add("Size", mib(s.Spec.Size))
		r.add("Filesystem", s.Spec.Filesystem)
		r.add("Consistency", s.Spec.Consistency)
		r.add("Template", s.Spec.Template)
		if s.Spec.Pool != "" {
			r.add("Pool", s.Spec.Pool)
		}
		r.add("Labels", joinLabels(s.Metadata.Labels))
		if s.State.Tainted {
			r.add("Tainted", "a virtual machine, or a client of an export, could write its raw blocks")
		}
		r.add("Promised", bytesize.Human(s.State.Promised))
		if space := s.State.Space; space != nil {
			r.add("Allocated", bytesize.Human(space.Allocated))
			if space.Exclusive != nil {
				r.add("Freed by deleting", bytesize.Human(*space.Exclusive))
			}
		}
		r.add("Writes held for", fmt.Sprintf("%.1f ms", s.State.HeldMilliseconds))
		r.add("Created", s.Metadata.CreatedAt)
	})
}
