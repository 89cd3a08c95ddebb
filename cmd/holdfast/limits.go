package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

// limitFlags are rates as they are written on the command line.
type limitFlags struct {
	readIOPS, writeIOPS   int64
	readBytes, writeBytes string
}

func (l *limitFlags) register(f *pflag.FlagSet) {
	f.Int64Var(&l.readIOPS, "read-iops", 0, "read requests per second (0: no limit)")
	f.Int64Var(&l.writeIOPS, "write-iops", 0, "write requests per second (0: no limit)")
	f.StringVar(&l.readBytes, "read-rate", "0", "bytes read per second, as 10MiB (0: no limit)")
	f.StringVar(&l.writeBytes, "write-rate", "0", "bytes written per second, as 10MiB (0: no limit)")
}

func (l *limitFlags) read() (client.RateLimits, error) {
	r := client.RateLimits{ReadIOPS: l.readIOPS, WriteIOPS: l.writeIOPS}
	for _, f := range []struct {
		flag, text string
		to         *int64
	}{{"--read-rate", l.readBytes, &r.ReadBytes}, {"--write-rate", l.writeBytes, &r.WriteBytes}} {
		n, err := bytesize.Parse(f.text, 1)
		if err != nil {
			return r, usageError{fmt.Sprintf("%s: %v", f.flag, err)}
		}
		*f.to = n
	}
	return r, nil
}

func (a *app) attachmentLimits() *cobra.Command {
	var limits limitFlags
	c := &cobra.Command{
		Use: "limits VOLUME ID", Short: "Replace an attachment's rate limits while it is in use", Args: cobra.ExactArgs(2),
		Long:              "Replace an attachment's rate limits while it is in use. What is not given is not limited any more.",
		Example:           "  holdfast attachment limits data att-... --write-iops 500 --write-rate 20MiB",
		ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			l, err := limits.read()
			if err != nil {
				return err
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			at, err := cl.SetLimits(cmd.Context(), args[0], args[1], l)
			if err != nil {
				return err
			}
			return a.showAttachment(at)
		},
	}
	limits.register(c.Flags())
	return c
}

func limitRows(r *rows, at client.Attachment) {
	if at.Limits == nil {
		return
	}
	for _, l := range []struct {
		name  string
		value int64
		text  string
	}{
		{"Read limit", at.Limits.ReadIOPS, fmt.Sprintf("%d requests/s", at.Limits.ReadIOPS)},
		{"Read limit", at.Limits.ReadBytes, bytesize.Human(at.Limits.ReadBytes) + "/s"},
		{"Write limit", at.Limits.WriteIOPS, fmt.Sprintf("%d requests/s", at.Limits.WriteIOPS)},
		{"Write limit", at.Limits.WriteBytes, bytesize.Human(at.Limits.WriteBytes) + "/s"},
	} {
		if l.value > 0 {
			r.add(l.name, l.text)
		}
	}
	if e := at.Enforcement; e != nil {
		r.add("Limited by", e.Mechanism)
		for _, gap := range e.Gaps {
			r.add("Not limited", gap)
		}
	}
}
