package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

func (a *app) volumeCommand() *cobra.Command {
	c := group("volume", "Volumes: create, look, grow, delete",
		a.volumeCreate(), a.volumeGet(), a.volumeList(), a.volumeUpdate(), a.volumeDelete(), a.volumeLs(), a.volumeCat(),
		a.volumeStats(), a.volumeTop(), a.volumeWhy(), a.volumeTrim(), a.volumeFreeze(), a.volumeThaw(), a.volumeCapture(), a.volumeSanitize(), a.volumeMove(), a.volumeRelocate())
	c.Aliases = []string{"vol", "volumes"}
	return c
}

// parseMiB reads a size; a plain number is MiB, as in the API.
func parseMiB(text string) (int64, error) {
	n, err := bytesize.Parse(text, 1<<20)
	if err != nil {
		return 0, usageError{"--size: " + err.Error()}
	}
	if n == 0 || n%(1<<20) != 0 {
		return 0, usageError{fmt.Sprintf("--size: %q is not a whole number of MiB, at least 1", text)}
	}
	return n >> 20, nil
}

// parseLabels reads KEY=VALUE words.
func parseLabels(words []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		if !ok || k == "" {
			return nil, usageError{fmt.Sprintf("--label: %q is not KEY=VALUE", w)}
		}
		labels[k] = v
	}
	return labels, nil
}

func (a *app) volumeCreate() *cobra.Command {
	var v client.Volume
	var size, idempotency string
	var labels []string
	c := &cobra.Command{
		Use: "create [NAME]", Short: "Make a volume; it is usable when this returns", Args: cobra.MaximumNArgs(1),
		Example: "  holdfast volume create data --size 10GiB\n  holdfast volume create work --template toolchain:3 --filesystem xfs --label team=ci",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) > 0 {
				v.Metadata.Name = args[0]
			}
			if size != "" {
				if v.Spec.Size, err = parseMiB(size); err != nil {
					return err
				}
			}
			if v.Metadata.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			made, err := cl.CreateVolume(cmd.Context(), v, idempotency)
			if err != nil {
				return err
			}
			return a.showVolume(made)
		},
	}
	f := c.Flags()
	f.StringVarP(&size, "size", "s", "", "size, as 10GiB or in MiB (default: the template's, else 1GiB)")
	f.StringVarP(&v.Spec.Template, "template", "t", "", "template to fill it from: NAME, NAME:latest or NAME:VERSION")
	f.StringVar(&v.Spec.Snapshot, "snapshot", "", "snapshot to make it from: VOLUME/SNAPSHOT or a snapshot's id")
	f.StringVar(&v.Spec.Filesystem, "filesystem", "", "ext4, xfs, btrfs or none (default ext4)")
	f.StringVar(&v.Spec.Pool, "pool", "", "pool to make it in (default: as the server's policy has it)")
	f.StringVar(&v.Spec.Region, "region", "", "region (default: the server's)")
	f.StringVar(&v.Metadata.DisplayName, "display-name", "", "name for people")
	f.StringVar(&v.Metadata.ExternalID, "external-id", "", "your own id for it")
	f.StringArrayVarP(&labels, "label", "l", nil, "KEY=VALUE; may be repeated")
	f.StringVar(&idempotency, "idempotency-key", "", "makes a repetition of this command give the same answer")
	c.MarkFlagsMutuallyExclusive("template", "snapshot")
	_ = c.RegisterFlagCompletionFunc("template", a.completeTemplates)
	_ = c.RegisterFlagCompletionFunc("filesystem", cobra.FixedCompletions([]string{"ext4", "xfs", "btrfs", "none"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) volumeGet() *cobra.Command {
	var byExternalID bool
	c := &cobra.Command{
		Use: "get NAME", Short: "Show a volume", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			get := cl.Volume
			if byExternalID {
				get = cl.VolumeByExternalID
			}
			v, err := get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showVolume(v)
		},
	}
	c.Flags().BoolVar(&byExternalID, "external-id", false, "NAME is an external id")
	return c
}

func (a *app) volumeList() *cobra.Command {
	var q client.VolumeQuery
	var labels []string
	var limit int
	c := &cobra.Command{
		Use: "list", Aliases: []string{"ls-all"}, Short: "List volumes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if q.Labels, err = parseLabels(labels); err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			q.Limit = 200
			if limit > 0 {
				q.Limit = min(limit, q.Limit)
			}
			list := []client.Volume{}
			for v, err := range cl.Volumes(cmd.Context(), q) {
				if err != nil {
					return err
				}
				if list = append(list, v); len(list) == limit {
					break
				}
			}
			return a.show(list, func(r *rows) {
				r.add("NAME", "SIZE", "STATUS", "ATTACHED TO", "REGION", "CREATED")
				for _, v := range list {
					r.add(v.Metadata.Name, mib(v.Spec.Size), v.Status, v.State.AttachedTo, v.Spec.Region, v.Metadata.CreatedAt)
				}
			})
		},
	}
	f := c.Flags()
	f.StringVarP(&q.Search, "search", "q", "", "only those with this text in a name or label (2 characters or more)")
	f.StringVar(&q.Sort, "sort", "", "createdAt:desc (default), createdAt:asc, name:asc or name:desc")
	f.StringSliceVar(&q.Status, "status", nil, "only those with one of these statuses")
	f.StringArrayVarP(&labels, "label", "l", nil, "only those with this KEY=VALUE; may be repeated")
	f.IntVar(&limit, "limit", 0, "at most this many (default: all)")
	return c
}

func (a *app) volumeUpdate() *cobra.Command {
	var size, displayName, externalID string
	var labels []string
	var noLabels bool
	c := &cobra.Command{
		Use: "update NAME", Aliases: []string{"resize"}, Short: "Grow a volume or change its labels and names", Args: cobra.ExactArgs(1),
		Long:              "Grow a volume or change its labels and names. What is not given is kept. Volumes never shrink.",
		Example:           "  holdfast volume update data --size 20GiB",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			var ch client.VolumeChange
			f := cmd.Flags()
			if f.Changed("size") {
				n, err := parseMiB(size)
				if err != nil {
					return err
				}
				ch.SizeMiB = &n
			}
			if f.Changed("display-name") {
				ch.DisplayName = &displayName
			}
			if f.Changed("external-id") {
				ch.ExternalID = &externalID
			}
			if f.Changed("label") || noLabels {
				l, err := parseLabels(labels)
				if err != nil {
					return err
				}
				ch.Labels = l
			}
			if ch.SizeMiB == nil && ch.DisplayName == nil && ch.ExternalID == nil && ch.Labels == nil {
				return usageError{"nothing to change: give --size, --label, --no-labels, --display-name or --external-id"}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.UpdateVolume(cmd.Context(), args[0], ch)
			if err != nil {
				return err
			}
			return a.showVolume(v)
		},
	}
	f := c.Flags()
	f.StringVarP(&size, "size", "s", "", "new size, as 20GiB or in MiB")
	f.StringVar(&displayName, "display-name", "", "name for people")
	f.StringVar(&externalID, "external-id", "", "your own id for it")
	f.StringArrayVarP(&labels, "label", "l", nil, "KEY=VALUE; those given replace all there are")
	f.BoolVar(&noLabels, "no-labels", false, "remove all labels")
	c.MarkFlagsMutuallyExclusive("label", "no-labels")
	return c
}

func (a *app) volumeDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete volumes and their data", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, name := range args {
				if _, err := cl.DeleteVolume(cmd.Context(), name); err != nil {
					return err
				}
				a.done("volume %s deleted", name)
			}
			return nil
		},
	}
}

// done says on stderr what was done, so that -o json stays pure.
func (a *app) done(format string, args ...any) { fmt.Fprintf(a.errOut, format+"\n", args...) }

func mib(n int64) string { return bytesize.Human(n << 20) }

func (a *app) showVolume(v client.Volume) error {
	return a.show(v, func(r *rows) {
		r.add("Name", v.Metadata.Name)
		r.add("Workspace", v.Metadata.Workspace)
		r.add("Status", v.Status)
		r.add("Size", mib(v.Spec.Size))
		r.add("Filesystem", v.Spec.Filesystem)
		r.add("Template", v.Spec.Template)
		if v.Spec.Snapshot != "" {
			r.add("Made from", v.Spec.Snapshot)
		}
		r.add("Region", v.Spec.Region)
		if v.Spec.Pool != "" {
			r.add("Pool", v.Spec.Pool)
		}
		if m := v.State.Move; m != nil {
			r.add("Moving", strings.TrimSuffix(fmt.Sprintf("to %s, %s, %s of %s: %s", m.To, m.Phase, bytesize.Human(m.Done), bytesize.Human(m.Size), m.Failure), ": "))
		}
		r.add("Display name", v.Metadata.DisplayName)
		r.add("External id", v.Metadata.ExternalID)
		r.add("Labels", joinLabels(v.Metadata.Labels))
		r.add("Attached to", v.State.AttachedTo)
		if !v.State.FrozenUntil.IsZero() {
			r.add("Frozen until", v.State.FrozenUntil)
		}
		if s := v.State.Sizes; s != nil {
			r.add("Device", bytesize.Human(s.Device))
			r.add("Filesystem size", bytesize.Human(s.Filesystem))
			r.add("Allocated", fmt.Sprintf("%s (%s shared)", bytesize.Human(s.Allocated), bytesize.Human(s.Shared)))
			if s.Pending != "" {
				r.add("Pending", s.Pending)
			}
			if h := s.Hydration; h != nil {
				r.add("Hydration", hydrationText(*h))
			}
		}
		r.add("Created", v.Metadata.CreatedAt)
		for _, e := range v.Events {
			r.add("Event", cell(e.Time)+" "+e.Type+" "+e.Status+": "+e.Message)
		}
	})
}

// hydrationText says how much of a volume is not in its place yet.
func hydrationText(h client.Hydration) string {
	text := fmt.Sprintf("%s of %s left", bytesize.Human(h.Absent), bytesize.Human(h.Total))
	if !h.FailingSince.IsZero() {
		text += ", failing since " + cell(h.FailingSince)
	}
	return text
}

func joinLabels(l map[string]string) string {
	words := make([]string, 0, len(l))
	for _, k := range slices.Sorted(maps.Keys(l)) {
		words = append(words, k+"="+l[k])
	}
	return strings.Join(words, ",")
}
