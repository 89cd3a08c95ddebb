package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/push"
	"holdfast/internal/tarball"
)

func (a *app) templateCommand() *cobra.Command {
	c := group("template", "Templates that volumes are filled from",
		a.templatePush(), a.templateImport(), a.templateList(), a.templateGet(), a.templateDelete(), a.templateDeleteVersion(),
		a.templatePublish(), a.templateRegister(), a.templateRelocate(), a.templateDiff(), a.templatePull(), a.templateHistory(), a.templateRollback(), a.templateKeep(), a.templateVerify(),
		a.templatePin("pin", "Keep versions from being removed", true), a.templatePin("unpin", "Take pins of versions away", false))
	c.Aliases = []string{"templates"}
	return c
}

func (a *app) templatePush() *cobra.Command {
	p := client.Push{}
	var size string
	var quiet bool
	c := &cobra.Command{
		Use: "push NAME DIR|FILE", Short: "Upload a directory or an archive as a new version; it is usable when this returns", Args: cobra.ExactArgs(2),
		Long: "Upload a directory or an archive as a new version of a template, made if it is not there.\n" +
			"Symbolic and hard links, modes, owners, times, extended attributes, empty directories and odd\n" +
			"names are kept. Nothing may change in the directory meanwhile. Devices are refused, sockets\n" +
			"left out. Of a directory only what the template's newest versions lack is sent.\n\n" +
			"An archive is a tar, tar.gz, tar.zst or zip, whatever its name; with --format oci, an OCI\n" +
			"image layout (a directory or a tar of it) or what docker save writes.",
		Example: "  holdfast template push toolchain ./rootfs --default-size 4GiB\n" +
			"  holdfast template push toolchain rootfs.tar.zst\n" +
			"  holdfast template push toolchain layout.tar --format oci",
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
	f.StringVar(&p.Format, "format", "", "how the archive is packed: tar, tar.gz, tar.zst, zip, oci (default: the server looks)")
	f.StringVar(&size, "default-size", "", "size of volumes made from it, as 4GiB or in MiB")
	f.StringVar(&p.Description, "description", "", "what it is")
	f.BoolVar(&quiet, "quiet", false, "no progress bar")
	return c
}

func (a *app) push(cmd *cobra.Command, p client.Push, from string, quiet bool) error {
	cl, err := a.client()
	if err != nil {
		return err
	}
	archive, what, err := a.archive(cmd, &p, from)
	if err != nil {
		return err
	}
	defer archive.Close()
	bar := newProgress(a.errOut, p.Name, p.Length, quiet)
	p.Progress = bar.at
	t, err := cl.PushTemplate(cmd.Context(), p)
	bar.end()
	if err != nil {
		return err
	}
	return a.show(t, func(r *rows) {
		r.add(fmt.Sprintf("%s:%s", t.Metadata.Name, t.State.LatestVersion), what)
	})
}

// archive opens what is to be sent: an archive as it is, or one of a directory.
func (a *app) archive(cmd *cobra.Command, p *client.Push, from string) (archive io.ReadCloser, what string, err error) {
	f, err := os.Open(from)
	if err != nil {
		return nil, "", err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() {
		p.Archive, p.Length = f, info.Size()
		return f, bytesize.Human(info.Size()), nil
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, "", err
	}
	plan, err := tarball.New(cmd.Context(), from)
	if err != nil {
		return nil, "", err
	}
	for _, s := range plan.Skipped {
		a.done("left out: %s is a socket", printable(s))
	}
	archive = plan.Reader()
	p.Archive, p.Length = archive, plan.Length()
	if p.Format == "" || p.Format == "tar" {
		p.Delta = push.Directory(plan)
	}
	return archive, fmt.Sprintf("%d files, %s", plan.Files, bytesize.Human(plan.Bytes)), nil
}

func (a *app) templateImport() *cobra.Command {
	var i client.Import
	c := &cobra.Command{
		Use: "import NAME IMAGE", Short: "Make a new version of a container image; it is usable when this returns", Args: cobra.ExactArgs(2),
		Long: "Let the server fetch a container image from a registry and make a new version of a template\n" +
			"of its files, whiteouts applied. The server fetches only from registries that its operator\n" +
			"listed (the setting registries).",
		Example:           "  holdfast template import toolchain registry.example/team/toolchain:1.4",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			i.Image = args[1]
			v, err := cl.ImportTemplate(cmd.Context(), args[0], i)
			if err != nil {
				return err
			}
			return a.show(v, func(r *rows) {
				r.add(v.TemplateName+":"+v.Name, bytesize.Human(v.ContentSize))
			})
		},
	}
	f := c.Flags()
	f.StringVar(&i.Version, "version", "", "name of the version (default: its number)")
	f.StringVar(&i.Platform, "platform", "", "OS/ARCH[/VARIANT] (default: linux on the server's architecture)")
	return c
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
					r.add("Version "+v.Name, v.Status+", "+bytesize.Human(v.ContentSize)+whereRemote(v))
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
