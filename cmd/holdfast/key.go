package main

import (
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
)

func (a *app) keyCommand() *cobra.Command {
	c := group("key", "API keys", a.keyCreate(), a.keyList(), a.keyRevoke())
	c.Aliases = []string{"keys"}
	return c
}

func (a *app) keyCreate() *cobra.Command {
	var k client.NewKey
	var expires string
	c := &cobra.Command{
		Use: "create", Short: "Make a key; its secret is shown once", Args: cobra.NoArgs,
		Long:    "Make a key for the workspace of --workspace. The secret is shown once and kept nowhere.",
		Example: "  holdfast key create --workspace main --role writer --expires 720h",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if expires != "" {
				at, err := parseExpiry(expires, time.Now())
				if err != nil {
					return err
				}
				k.ExpiresAt = at
			}
			if !k.ControlPlane {
				k.Workspace = a.server.options().Workspace
			}
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			made, err := cl.CreateKey(cmd.Context(), k)
			if err != nil {
				return err
			}
			return a.show(made, func(r *rows) {
				r.add("ID", made.ID)
				r.add("Workspace", made.Workspace)
				r.add("Role", made.Role)
				r.add("Expires", made.ExpiresAt)
				r.add("Key", made.Secret)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&k.Name, "name", "", "what it is for; shows in createdBy and the audit log")
	f.StringVar(&k.Role, "role", "writer", "reader, writer or admin")
	f.StringVar(&expires, "expires", "", "when it ends: a duration as 720h or 30d, or a time as 2027-01-31T00:00:00Z (default: never)")
	f.BoolVar(&k.ControlPlane, "control-plane", false, "may act for any workspace and on the node")
	_ = c.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{"reader", "writer", "admin"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// parseExpiry reads a duration from now (also in days) or a time.
func parseExpiry(text string, now time.Time) (time.Time, error) {
	if at, err := time.Parse(time.RFC3339, text); err == nil {
		return at, nil
	}
	hours := text
	var days time.Duration = 1
	if n := len(text); n > 1 && text[n-1] == 'd' {
		hours, days = text[:n-1]+"h", 24
	}
	d, err := time.ParseDuration(hours)
	if err != nil || d <= 0 || d > 1<<62/days {
		return time.Time{}, usageError{"--expires: " + text + " is neither a duration as 720h or 30d nor a time as 2027-01-31T00:00:00Z"}
	}
	return now.Add(d * days).UTC().Truncate(time.Second), nil
}

func (a *app) keyList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List keys", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			all, err := cl.Keys(cmd.Context())
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) {
				r.add("ID", "NAME", "WORKSPACE", "ROLE", "CREATED", "EXPIRES", "REVOKED")
				for _, k := range all {
					workspace := k.Workspace
					if k.ControlPlane {
						workspace = "(any)"
					}
					r.add(k.ID, k.Name, workspace, k.Role, k.CreatedAt, k.ExpiresAt, k.RevokedAt)
				}
			})
		},
	}
}

func (a *app) keyRevoke() *cobra.Command {
	return &cobra.Command{
		Use: "revoke ID...", Short: "End keys, within a second", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.nodeClient()
			if err != nil {
				return err
			}
			for _, id := range args {
				if _, err := cl.RevokeKey(cmd.Context(), id); err != nil {
					return err
				}
				a.done("key %s revoked", id)
			}
			return nil
		},
	}
}
