package main

import (
	"github.com/spf13/cobra"
)

func (a *app) volumeSanitize() *cobra.Command {
	var to, size string
	c := &cobra.Command{
		Use: "sanitize NAME", Short: "Copy the files of a volume that a virtual machine has written into a new volume", Args: cobra.ExactArgs(1),
		Long: "Copy the files of a detached volume that a virtual machine has written into a fresh ext4 of a new volume. Containers and the\n" +
			"host may have the new one: what the machine wrote as raw blocks is mounted nowhere and stays in the old volume.\n\n" +
			"Owners, modes, times, links, holes and extended attributes are kept as far as the reader knows them. An event of the new\n" +
			"volume tells what was left out.",
		Example:           "  holdfast volume sanitize data --to data-clean",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			var n int64
			if size != "" {
				var err error
				if n, err = parseMiB(size); err != nil {
					return err
				}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.SanitizeVolume(cmd.Context(), args[0], to, n)
			if err != nil {
				return err
			}
			return a.showVolume(v)
		},
	}
	f := c.Flags()
	f.StringVar(&to, "to", "", "name of the new volume")
	f.StringVarP(&size, "size", "s", "", "size of the new volume, as 20GiB or in MiB (default: that of the old one)")
	_ = c.MarkFlagRequired("to")
	return c
}
