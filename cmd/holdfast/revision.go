package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

// cutVersion takes NAME:VERSION apart; without a version it is "".
func cutVersion(s string) (name, version string) {
	name, version, _ = strings.Cut(s, ":")
	return name, version
}

func needVersion(s string) (name, version string, err error) {
	if name, version = cutVersion(s); name == "" || version == "" {
		return "", "", fmt.Errorf("%q is not NAME:VERSION", s)
	}
	return name, version, nil
}

func (a *app) templateHistory() *cobra.Command {
	return &cobra.Command{
		Use: "history NAME", Short: "Show the versions of a template, what they cost and what uses them", Args: cobra.ExactArgs(1),
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			h, err := cl.TemplateHistory(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(h, func(r *rows) { historyRows(r, h) })
		},
	}
}

func historyRows(r *rows, h client.TemplateHistory) {
	r.add("NUMBER", "NAME", "STATUS", "CONTENTS", "IMAGE", "CREATED", "BY", "PINNED", "VOLUMES", "SOURCES", "DIGEST", "NOTE")
	for _, v := range h.Versions {
		pinned, note := "", v.Failure
		if v.Pinned != nil {
			pinned = "by " + v.Pinned.By
		}
		if v.RollbackOf > 0 && note == "" {
			note = fmt.Sprintf("rollback to %d", v.RollbackOf)
		}
		r.add(v.Number, v.Name, v.Status, bytesize.Human(v.ContentSize), bytesize.Human(v.ImageSize), v.CreatedAt, v.CreatedBy, pinned,
			v.Volumes.Count, len(v.Sources), shortDigest(v.Digest), note)
	}
	for _, e := range h.Events {
		r.add("event", e.Version, e.Type, "", "", e.Time, "", "", "", "", "", e.Message)
	}
}

// shortDigest is enough of one to tell versions apart.
func shortDigest(d string) string {
	_, hex, _ := strings.Cut(d, ":")
	return hex[:min(len(hex), 12)]
}

func (a *app) templateRollback() *cobra.Command {
	return &cobra.Command{
		Use: "rollback NAME VERSION", Short: "Make an older version the newest again, as a new version", Args: cobra.ExactArgs(2),
		Long: "Make an older version the newest again. A new version is made, which shares its bytes with\n" +
			"the old one; NAME and NAME:latest mean it from then on. When the newest version holds the\n" +
			"same already, nothing is made.",
		Example:           "  holdfast template rollback toolchain 3",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.RollbackTemplate(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.show(v, func(r *rows) { r.add(args[0]+":"+v.Name, "holds what version "+args[1]+" holds") })
		},
	}
}

func (a *app) templatePin(use, short string, on bool) *cobra.Command {
	return &cobra.Command{
		Use: use + " NAME:VERSION...", Short: short, Args: cobra.MinimumNArgs(1), ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, arg := range args {
				name, version, err := needVersion(arg)
				if err != nil {
					return err
				}
				if on {
					_, err = cl.PinTemplateVersion(cmd.Context(), name, version)
				} else {
					_, err = cl.UnpinTemplateVersion(cmd.Context(), name, version)
				}
				if err != nil {
					return err
				}
				a.done("version %s of template %s %sned", version, name, use)
			}
			return nil
		},
	}
}

func (a *app) templateKeep() *cobra.Command {
	var versions, days int
	c := &cobra.Command{
		Use: "keep NAME", Short: "Say how long versions are kept", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeTemplates,
		Long: "Say how long READY versions of a template are kept: the newest so many, and for so many\n" +
			"days; 0 means as the node is configured. The newest version and pinned ones always stay.",
		Example: "  holdfast template keep toolchain --versions 10 --days 90",
		RunE: func(cmd *cobra.Command, args []string) error {
			var v, d *int
			if cmd.Flags().Changed("versions") {
				v = &versions
			}
			if cmd.Flags().Changed("days") {
				d = &days
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			t, err := cl.SetRetention(cmd.Context(), args[0], v, d)
			if err != nil {
				return err
			}
			return a.show(t, func(r *rows) { r.add(args[0], keptFor(t.Spec.Retention)) })
		},
	}
	c.Flags().IntVar(&versions, "versions", 0, "newest versions that are kept, pinned ones not counted; 0: as the node has it")
	c.Flags().IntVar(&days, "days", 0, "days after which a version goes; 0: as the node has it")
	c.MarkFlagsOneRequired("versions", "days")
	return c
}

func keptFor(r *client.Retention) string {
	if r == nil {
		return "as the node has it"
	}
	var parts []string
	if r.Versions > 0 {
		parts = append(parts, fmt.Sprintf("%d versions", r.Versions))
	}
	if r.Days > 0 {
		parts = append(parts, fmt.Sprintf("%d days", r.Days))
	}
	return strings.Join(parts, ", ")
}

var errDamaged = errors.New("not every version is as it was published")

func (a *app) templateVerify() *cobra.Command {
	return &cobra.Command{
		Use: "verify NAME[:VERSION]", Short: "Let the server hold the images of versions against their digests", Args: cobra.ExactArgs(1),
		Long: "Let the server read the image of a version, or of all versions, and compare it with what was\n" +
			"published. A damaged version is FAILED from then on and no volume is made from it. Exit code\n" +
			"1 when one is damaged.",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			name, version := cutVersion(args[0])
			versions := []string{version}
			if version == "" {
				t, err := cl.Template(cmd.Context(), name)
				if err != nil {
					return err
				}
				versions = nil
				for _, v := range t.Versions {
					if v.Status == "READY" || v.Damaged {
						versions = append(versions, v.Name)
					}
				}
			}
			var found []client.TemplateVersion
			for _, version := range versions {
				v, err := cl.VerifyTemplateVersion(cmd.Context(), name, version)
				if err != nil {
					return err
				}
				found = append(found, v)
			}
			return a.showVerified(name, found)
		},
	}
}

func (a *app) showVerified(name string, found []client.TemplateVersion) error {
	damaged := false
	err := a.show(found, func(r *rows) {
		for _, v := range found {
			what := "as published"
			if v.Damaged {
				what = v.Failure
			}
			r.add(name+":"+v.Name, v.Status, what)
		}
	})
	for _, v := range found {
		damaged = damaged || v.Damaged
	}
	if err == nil && damaged {
		return errDamaged
	}
	return err
}
