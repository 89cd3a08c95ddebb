package main

import (
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/preflight"
)

func (a *app) poolCommand() *cobra.Command {
	c := group("pool", "Pools that volumes are kept in", &cobra.Command{
		Use: "list", Short: "Show space and promises", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			all, err := cl.Pools(cmd.Context())
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) { poolRows(r, all) })
		},
	})
	c.Aliases = []string{"pools"}
	return c
}

func poolRows(r *rows, all []client.Pool) {
	r.add("NAME", "BACKEND", "TOTAL", "FREE", "PROVISIONED", "OTHER", "TRASH", "RESERVE", "OVERPROVISION", "AVAILABLE", "VOLUMES")
	for _, p := range all {
		r.add(p.Name, p.Backend, bytesize.Human(p.Total), bytesize.Human(p.Free), bytesize.Human(p.Provisioned), bytesize.Human(p.Other),
			bytesize.Human(p.Trash), bytesize.Human(p.Reserve), strconv.FormatFloat(p.Ratio, 'g', -1, 64), bytesize.Human(p.Available), p.Volumes)
	}
	for _, p := range all {
		if p.Unavailable != "" {
			r.add("unavailable", p.Name, p.Backend, p.Unavailable)
		}
		for _, q := range p.Quarantined {
			r.add("quarantined", q.Name, bytesize.Human(q.Bytes), q.Reason)
		}
	}
}

func (a *app) doctorCommand() *cobra.Command {
	var local bool
	c := &cobra.Command{
		Use: "doctor", Short: "Say what the node has and lacks, and what follows from it", Args: cobra.NoArgs,
		Long: "Say what the node has and lacks, and what follows from it. With --local this host is\n" +
			"looked at without a daemon. Exit code 1 when something is missing for the main job.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			var checks []client.Check
			if local {
				for _, c := range preflight.Host(cmd.Context()) {
					checks = append(checks, client.Check{Name: c.Name, Status: string(c.Status), Found: c.Found, Consequence: c.Consequence, Fix: c.Fix})
				}
			} else {
				cl, err := a.nodeClient()
				if err != nil {
					return err
				}
				if checks, err = cl.Doctor(cmd.Context()); err != nil {
					return err
				}
			}
			return a.showChecks(checks)
		},
	}
	c.Flags().BoolVar(&local, "local", false, "look at this host, without a daemon")
	return c
}

func (a *app) showChecks(checks []client.Check) error {
	failed := false
	err := a.show(checks, func(r *rows) {
		for _, c := range checks {
			r.add(c.Status, c.Name, c.Found)
			if c.Consequence != "" {
				r.add(" ", " ", "→ "+c.Consequence)
			}
			if c.Fix != "" {
				r.add(" ", " ", "→ "+c.Fix)
			}
		}
	})
	for _, c := range checks {
		failed = failed || c.Status == string(preflight.Fail)
	}
	if err == nil && failed {
		return errDoctor
	}
	return err
}

func (a *app) auditCommand() *cobra.Command {
	var limit int
	c := &cobra.Command{
		Use: "audit", Short: "Show the newest changes, and who made them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			all, err := cl.Audit(cmd.Context(), limit)
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) {
				r.add("TIME", "WORKSPACE", "PRINCIPAL", "ACTION", "RESOURCE", "STATUS", "ERROR", "REMOTE")
				for _, e := range all {
					r.add(e.Time, e.Workspace, e.Principal, e.Action, e.Resource, e.Status, e.Error, e.Remote)
				}
			})
		},
	}
	c.Flags().IntVar(&limit, "limit", 50, "at most this many")
	return c
}

// version is set by the linker.
var version = "unknown"

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program and of the API it speaks", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := map[string]string{"version": version, "api": client.Version}
			return a.show(v, func(r *rows) {
				r.add(fmt.Sprintf("holdfast %s, API %s", version, client.Version))
			})
		},
	}
}
