package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/tarball"
)

func (a *app) templateCommand() *cobra.Command {
	c := group("template", "Templates that volumes are filled from",
		a.templatePush(), a.templateList(), a.templateGet(), a.templateDelete(), a.templateDeleteVersion(),
		a.templateHistory(), a.templateRollback(), a.templateKeep(), a.templateVerify(),
		a.templatePin("pin", "Keep versions from being removed", true), a.templatePin("unpin", "Take pins of versions away", false))
	c.Aliases = []string{"templates"}
	return c
}

func (a *app) templatePush() *cobra.Command {
	p := client.Push{}
	var size string
	var quiet bool
	c := &cobra.Command{
		Use: "push NAME DIR", Short: "Upload a directory as a new version; it is usable when this returns", Args: cobra.ExactArgs(2),
		Long: "Upload a directory as a new version of a template, made if it is not there. Symbolic and\n" +
			"hard links, modes, owners, times, extended attributes, empty directories and odd names are\n" +
			"kept. Nothing may change in the directory meanwhile. Devices are refused, sockets left out.",
		Example:           "  holdfast template push toolchain ./rootfs --default-size 4GiB",
		ValidArgsFunction: a.completePush,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if size != "" {
				if p.DefaultSize, err = parseMiB(size); err != nil {
					return err
				}
			}
			p.Name = args[0]
			return a.push(cmd, p, args[1], quiet)
		},
	}
	f := c.Flags()
	f.StringVar(&p.Version, "version", "", "name of the version (default: its number)")
	f.StringVar(&size, "default-size", "", "size of volumes made from it, as 4GiB or in MiB")
	f.StringVar(&p.Description, "description", "", "what it is")
	f.BoolVar(&quiet, "quiet", false, "no progress bar")
	return c
}

func (a *app) push(cmd *cobra.Command, p client.Push, dir string, quiet bool) error {
	cl, err := a.client()
	if err != nil {
		return err
	}
	plan, err := tarball.New(cmd.Context(), dir)
	if err != nil {
		return err
	}
	for _, s := range plan.Skipped {
		a.done("left out: %s is a socket", printable(s))
	}
	archive := plan.Reader()
	defer archive.Close()
	p.Archive, p.Length = archive, plan.Length()
	bar := newProgress(a.errOut, p.Name, plan.Length(), quiet)
	p.Progress = bar.at
	t, err := cl.PushTemplate(cmd.Context(), p)
	bar.end()
	if err != nil {
		return err
	}
	return a.show(t, func(r *rows) {
		r.add(fmt.Sprintf("%s:%s", t.Metadata.Name, t.State.LatestVersion),
			fmt.Sprintf("%d files, %s", plan.Files, bytesize.Human(plan.Bytes)))
	})
}

func (a *app) templateList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Short: "List templates", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			all, err := cl.Templates(cmd.Context())
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) {
				r.add("NAME", "LATEST", "STATUS", "VERSIONS", "DEFAULT SIZE", "UPLOADED", "DESCRIPTION")
				for _, t := range all {
					r.add(t.Metadata.Name, t.State.LatestVersion, t.State.Status, t.State.VersionCount,
						sizeOrNone(t.Spec.DefaultSize), t.State.LastVersionUploadedAt, t.Spec.Description)
				}
			})
		},
	}
}

func sizeOrNone(n int64) string {
	if n == 0 {
		return ""
	}
	return mib(n)
}

func (a *app) templateGet() *cobra.Command {
	return &cobra.Command{
		Use: "get NAME", Short: "Show a template and its versions", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			t, err := cl.Template(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(t, func(r *rows) {
				r.add("Name", t.Metadata.Name)
				r.add("Description", t.Spec.Description)
				r.add("Default size", sizeOrNone(t.Spec.DefaultSize))
				r.add("Labels", joinLabels(t.Metadata.Labels))
				r.add("Created", t.Metadata.CreatedAt)
				for _, v := range t.Versions {
					r.add("Version "+v.Name, v.Status+", "+bytesize.Human(v.ContentSize))
				}
			})
		},
	}
}

func (a *app) templateDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete templates with all versions; volumes stay", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, name := range args {
				if _, err := cl.DeleteTemplate(cmd.Context(), name); err != nil {
					return err
				}
				a.done("template %s deleted", name)
			}
			return nil
		},
	}
}

func (a *app) templateDeleteVersion() *cobra.Command {
	return &cobra.Command{
		Use: "delete-version NAME VERSION", Short: "Delete one version; the only one cannot be deleted", Args: cobra.ExactArgs(2),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			if _, err := cl.DeleteTemplateVersion(cmd.Context(), args[0], args[1]); err != nil {
				return err
			}
			a.done("version %s of template %s deleted", args[1], args[0])
			return nil
		},
	}
}
