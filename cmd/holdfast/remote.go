package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/templates/remote"
)

func (a *app) templatePublish() *cobra.Command {
	var p client.Publication
	var size, dir string
	var quiet bool
	c := &cobra.Command{
		Use: "publish NAME[:VERSION] --to DIR", Short: "Write a version's image into files that any store can keep", Args: cobra.ExactArgs(1),
		Long: "Write the image of a version, as volumes of a size begin with it, into three files: the image\n" +
			"(sparse), what it is chunk by chunk, and a manifest, whose SHA-256 is printed. Upload all\n" +
			"three to one place of an object store or web server; then holdfast template register makes\n" +
			"volumes of it usable at once, on any host, while their bytes come when they are wanted.",
		Example: "  holdfast template publish toolchain:3 --to ./published --size 4GiB\n" +
			"  aws s3 cp --recursive ./published s3://bucket/holdfast/",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if dir == "" {
				return usageError{"--to is required: the directory for the files"}
			}
			if size != "" {
				if p.Size, err = parseMiB(size); err != nil {
					return err
				}
			}
			name, version, _ := strings.Cut(args[0], ":")
			p.Version = version
			return a.publish(cmd, name, p, dir, quiet)
		},
	}
	f := c.Flags()
	f.StringVar(&dir, "to", "", "directory for the files; made if it is not there")
	f.StringVar(&size, "size", "", "size of the volumes, as 4GiB or in MiB (default: the template's, or as small as it can be)")
	f.StringVar(&p.Filesystem, "filesystem", "", "ext4, xfs or btrfs (default: ext4)")
	f.BoolVar(&quiet, "quiet", false, "no progress bar")
	return c
}

func (a *app) publish(cmd *cobra.Command, name string, p client.Publication, dir string, quiet bool) error {
	cl, err := a.client()
	if err != nil {
		return err
	}
	stream, err := cl.TemplateImage(cmd.Context(), name, p)
	if err != nil {
		return err
	}
	bar := newProgress(a.errOut, name, 0, quiet)
	files, err := remote.Publish(dir, stream, func(done, size int64) {
		bar.total = size
		bar.at(done)
	})
	bar.end()
	if err := errors.Join(err, stream.Close()); err != nil {
		return err
	}
	return a.show(files, func(r *rows) {
		r.add("Image", fmt.Sprintf("%s (%s)", files.Image, bytesize.Human(files.Size)))
		r.add("Chunks", files.Chunks)
		r.add("Manifest", files.Manifest)
		r.add("Digest", files.Digest)
	})
}

func (a *app) templateRegister() *cobra.Command {
	var reg client.Registration
	c := &cobra.Command{
		Use: "register NAME URL DIGEST", Short: "Make a version of a published one, whose bytes stay where they are", Args: cobra.ExactArgs(3),
		Long: "Make a new version of a template of what holdfast template publish wrote and somebody\n" +
			"uploaded. URL is the manifest's, below a prefix of the setting remote_templates; DIGEST is\n" +
			"what publish printed. This is for operators: it needs a control-plane key, or the socket.",
		Example:           "  holdfast template register toolchain https://store.example/holdfast/toolchain-3.json sha256:9f86d0…",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			reg.Manifest, reg.Digest = args[1], args[2]
			v, err := cl.RegisterTemplate(cmd.Context(), args[0], reg)
			if err != nil {
				return err
			}
			return a.show(v, func(r *rows) {
				r.add(v.TemplateName+":"+v.Name, bytesize.Human(v.ContentSize)+whereRemote(v))
			})
		},
	}
	c.Flags().StringVar(&reg.Version, "version", "", "name of the version (default: its number)")
	return c
}

func (a *app) templateRelocate() *cobra.Command {
	return &cobra.Command{
		Use: "relocate NAME:VERSION URL", Short: "Say where the files of a registered version are by now", Args: cobra.ExactArgs(2),
		Long: "Have what is not here yet of a registered version, in its volumes and snapshots too, be fetched\n" +
			"from where its files have moved to. URL is the manifest's, below a prefix of the setting\n" +
			"remote_templates; it has to be the manifest that was registered. Volumes that are in use go\n" +
			"on without a break. This is for operators: it needs a control-plane key, or the socket.",
		Example:           "  holdfast template relocate toolchain:4 https://other.example/holdfast/toolchain-3.json",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version, ok := strings.Cut(args[0], ":")
			if !ok || version == "" {
				return usageError{"name the version, as in toolchain:4"}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.RelocateVersion(cmd.Context(), name, version, args[1])
			if err != nil {
				return err
			}
			return a.show(v, func(r *rows) {
				r.add(v.TemplateName+":"+v.Name, bytesize.Human(v.ContentSize)+whereRemote(v))
			})
		},
	}
}

func (a *app) volumeRelocate() *cobra.Command {
	return &cobra.Command{
		Use: "relocate NAME URL", Short: "Say where the files are by now of a version that was deleted", Args: cobra.ExactArgs(2),
		Long: "Have what is not here yet of a volume, whose registered version was deleted since, be fetched from\n" +
			"where the files have moved to; so it is then for all volumes and snapshots that were made of that\n" +
			"version. URL is that of a manifest of the same bytes, below a prefix of the setting\n" +
			"remote_templates. While the version is there: holdfast template relocate. This is for operators:\n" +
			"it needs a control-plane key, or the socket.",
		Example:           "  holdfast volume relocate data https://other.example/holdfast/toolchain-3.json",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.RelocateVolume(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.showVolume(v)
		},
	}
}

func whereRemote(v client.TemplateVersion) string {
	if v.Remote == nil {
		return ""
	}
	return fmt.Sprintf(", remote at %s: %s, volumes of %s or more", v.Remote.Host, v.Remote.Filesystem, mib(v.Remote.Size))
}
