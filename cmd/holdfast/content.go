package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
	"holdfast/internal/tarball"
)

func (a *app) templateDiff() *cobra.Command {
	return &cobra.Command{
		Use: "diff NAME:VERSION NAME[:VERSION]", Short: "List the files that differ between two versions of a template", Args: cobra.ExactArgs(2),
		Long: "List the files that were added (A), removed (D) and changed (M) between two versions of a\n" +
			"template, with what changed: kind, contents, target, mode, owner, mtime, xattrs, links. With\n" +
			"--output json each file is one line of JSON.",
		Example:           "  holdfast template diff toolchain:2 toolchain:3",
		ValidArgsFunction: a.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, from, err := needVersion(args[0])
			if err != nil {
				return err
			}
			other, to := cutVersion(args[1])
			if other != name {
				return fmt.Errorf("%q and %q are two templates: versions of one can be compared", name, other)
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			return cl.DiffTemplate(cmd.Context(), name, from, to, a.printDiff())
		},
	}
}

// printDiff prints entries as they come: there may be millions.
func (a *app) printDiff() func(client.DiffEntry) error {
	if a.output != formatTable {
		enc := json.NewEncoder(a.out) // a line each is YAML as well
		enc.SetEscapeHTML(false)
		separate := a.output == formatYAML
		return func(e client.DiffEntry) error {
			if separate {
				if _, err := io.WriteString(a.out, "- "); err != nil {
					return err
				}
			}
			return enc.Encode(e)
		}
	}
	letters := map[string]string{"added": "A", "removed": "D", "changed": "M"}
	return func(e client.DiffEntry) error {
		line := letters[e.Action] + " " + printable(e.Path)
		if e.Bytes != nil {
			line = letters[e.Action] + " " + strings.Trim(strconv.Quote(string(e.Bytes)), `"`)
		}
		if len(e.Changed) > 0 {
			line += " (" + strings.Join(changes(e), ", ") + ")"
		}
		_, err := fmt.Fprintln(a.out, line)
		return err
	}
}

// changes says what changed, with values where they are short.
func changes(e client.DiffEntry) []string {
	texts := make([]string, len(e.Changed))
	for i, what := range e.Changed {
		texts[i] = what
		if e.Before == nil || e.After == nil {
			continue
		}
		switch what {
		case "kind":
			texts[i] = fmt.Sprintf("%s, was %s", e.After.Type, e.Before.Type)
		case "mode":
			texts[i] = fmt.Sprintf("mode %s, was %s", e.After.Mode, e.Before.Mode)
		case "owner":
			texts[i] = fmt.Sprintf("owner %d:%d, was %d:%d", e.After.UID, e.After.GID, e.Before.UID, e.Before.GID)
		}
	}
	return texts
}

func (a *app) templatePull() *cobra.Command {
	return &cobra.Command{
		Use: "pull NAME[:VERSION] DIR|-", Short: "Get the files of a version: into a new or empty directory, or as a tar on stdout", Args: cobra.ExactArgs(2),
		Long: "Get the files of a version of a template, by default the newest. Into a directory that is not\n" +
			"there or empty: links, modes, times, extended attributes and holes are kept, owners as well\n" +
			"for root; nothing outside of it is touched, whatever the template holds. With - the version\n" +
			"comes as a plain tar, which pushed again makes the same image.",
		Example: "  holdfast template pull toolchain:3 ./rootfs\n" +
			"  holdfast template pull toolchain - | zstd > toolchain.tar.zst",
		ValidArgsFunction: a.completePush,
		RunE: func(cmd *cobra.Command, args []string) error {
			name, version := cutVersion(args[0])
			cl, err := a.client()
			if err != nil {
				return err
			}
			archive, err := cl.PullTemplate(cmd.Context(), name, version)
			if err != nil {
				return err
			}
			defer archive.Close()
			if args[1] == "-" {
				_, err := io.Copy(a.out, archive)
				return err
			}
			return a.unpack(cmd, name+":"+archive.Version, archive, args[1])
		},
	}
}

func (a *app) unpack(cmd *cobra.Command, what string, archive io.Reader, dir string) error {
	done, err := tarball.Extract(cmd.Context(), archive, dir)
	if err != nil {
		return err
	}
	if !done.Owners {
		a.done("owners are not kept: only root may give files away")
	}
	return a.show(map[string]any{"version": what, "directory": dir, "entries": done.Entries, "bytes": done.Bytes}, func(r *rows) {
		r.add(what, fmt.Sprintf("%d entries, %s", done.Entries, bytesize.Human(done.Bytes)))
	})
}
