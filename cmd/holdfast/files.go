package main

import (
	"fmt"
	"io/fs"
	"path"
	"strconv"

	"github.com/spf13/cobra"
)

func (a *app) volumeLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls NAME [DIR]", Short: "List a directory of a detached volume", Args: cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := "/"
			if len(args) > 1 {
				dir = inside(args[1])
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			files, err := cl.ListFiles(cmd.Context(), args[0], dir)
			if err != nil {
				return err
			}
			return a.show(files, func(r *rows) {
				for _, f := range files {
					r.add(mode(f.Type, f.Mode), f.UID, f.GID, f.Size, f.ModTime, f.Name)
				}
			})
		},
	}
}

func (a *app) volumeCat() *cobra.Command {
	return &cobra.Command{
		Use: "cat NAME FILE...", Short: "Write files of a detached volume to stdout", Args: cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, file := range args[1:] {
				if err := cl.ReadFile(cmd.Context(), args[0], inside(file), a.out); err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
			}
			return nil
		},
	}
}

// inside makes a path absolute and clean, as the API takes it.
func inside(p string) string { return path.Clean("/" + p) }

// typeLetters are those of ls.
var typeLetters = map[string]string{"directory": "d", "symlink": "l", "file": "-", "pipe": "p", "socket": "s", "device": "c"}

// mode writes type and permissions as ls does.
func mode(kind, octal string) string {
	letter, ok := typeLetters[kind]
	if !ok {
		letter = "?"
	}
	perm, err := strconv.ParseUint(octal, 8, 12)
	if err != nil {
		return letter + octal
	}
	return letter + fs.FileMode(perm & 0o777).String()[1:]
}
