package main

import (
	"strconv"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

func (a *app) workspaceCommand() *cobra.Command {
	c := group("workspace", "Workspaces (tenants) and their quotas",
		a.workspaceCreate(), a.workspaceList(), a.workspaceGet(), a.workspaceQuota())
	c.Aliases = []string{"workspaces"}
	return c
}

func (a *app) workspaceCreate() *cobra.Command {
	return &cobra.Command{
		Use: "create NAME", Short: "Make a workspace", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			w, err := cl.CreateWorkspace(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showWorkspaces(w, w)
		},
	}
}

func (a *app) workspaceList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List workspaces", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			all, err := cl.Workspaces(cmd.Context())
			if err != nil {
				return err
			}
			return a.showWorkspaces(all, all...)
		},
	}
}

func (a *app) workspaceGet() *cobra.Command {
	return &cobra.Command{
		Use: "get NAME", Short: "Show a workspace", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			w, err := cl.Workspace(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showWorkspaces(w, w)
		},
	}
}

func (a *app) showWorkspaces(v any, all ...client.Workspace) error {
	return a.show(v, func(r *rows) {
		r.add("NAME", "VOLUMES", "TOTAL SIZE", "LARGEST", "CREATED")
		for _, w := range all {
			r.add(w.Name, bound(w.Quota.Volumes), boundMiB(w.Quota.MiB), boundMiB(w.Quota.LargestMiB), w.CreatedAt)
		}
	})
}

func bound(n int64) string {
	if n == 0 {
		return "no bound"
	}
	return strconv.FormatInt(n, 10)
}

func boundMiB(n int64) string {
	if n == 0 {
		return "no bound"
	}
	return mib(n)
}

func (a *app) workspaceQuota() *cobra.Command {
	var volumes, snapshots int64
	var total, largest string
	c := &cobra.Command{
		Use: "quota NAME", Short: "Show or set what a workspace may have; 0 is no bound", Args: cobra.ExactArgs(1),
		Example: "  holdfast workspace quota main --volumes 100 --total 1TiB --largest 100GiB",
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			q, err := cl.Quota(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			f := cmd.Flags()
			if f.Changed("volumes") {
				q.Volumes = volumes
			}
			if err := setMiB(&q.MiB, "--total", total); err != nil {
				return err
			}
			if err := setMiB(&q.LargestMiB, "--largest", largest); err != nil {
				return err
			}
			if f.Changed("snapshots") {
				q.Snapshots = snapshots
			}
			if f.Changed("volumes") || f.Changed("snapshots") || total != "" || largest != "" {
				if q, err = cl.SetQuota(cmd.Context(), args[0], q); err != nil {
					return err
				}
			}
			return a.show(q, func(r *rows) {
				r.add("VOLUMES", "TOTAL SIZE", "LARGEST", "SNAPSHOTS")
				r.add(bound(q.Volumes), boundMiB(q.MiB), boundMiB(q.LargestMiB), bound(q.Snapshots))
			})
		},
	}
	f := c.Flags()
	f.Int64Var(&volumes, "volumes", 0, "most volumes")
	f.Int64Var(&snapshots, "snapshots", 0, "most snapshots")
	f.StringVar(&total, "total", "", "most bytes of all volumes and snapshots together, as 1TiB or in MiB")
	f.StringVar(&largest, "largest", "", "largest volume, as 100GiB or in MiB")
	return c
}

func setMiB(to *int64, flag, text string) error {
	if text == "" {
		return nil
	}
	n, err := bytesize.Parse(text, 1<<20)
	if err != nil {
		return usageError{flag + ": " + err.Error()}
	}
	*to = n >> 20
	return nil
}
