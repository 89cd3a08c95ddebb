package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
)

const rootHelp = `Volumes that outlive their sandboxes: create, fill, attach, grow and delete them.

The server is asked over the local daemon's socket, or over HTTP with
--server and --key. Environment: HOLDFAST_URL, HOLDFAST_KEY and
HOLDFAST_WORKSPACE; BL_API_URL, BL_API_KEY and BL_WORKSPACE are read as well.

Exit codes:
  0  done
  1  failed for another reason than those below
  2  the command line is wrong
  3  not found
  4  the state forbids it: exists already, attached, pending
  5  no valid key, or one that may not do this
  6  the server refused the request as invalid
  7  a quota or the pool is full
  8  the server cannot be reached or is stopping`

// app is one invocation: where its output goes and what the global flags say.
type app struct {
	out, errOut io.Writer
	server      serverFlags
	output      string
	parsed      bool   // the command line was understood and its command runs
	usage       string // of the command that was asked for, for who got it wrong
}

// run executes one command line and gives the exit code.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	a := &app{out: out, errOut: errOut}
	root := a.command()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	asked, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	a.usage = usageOf(asked)
	code, text, hint := a.explain(err)
	fmt.Fprintln(errOut, "holdfast: "+text)
	if hint != "" {
		fmt.Fprintln(errOut, "hint: "+hint)
	}
	return code
}

// usageOf says where to read how a command is given, and of one that does something how.
func usageOf(c *cobra.Command) string {
	see := "see " + c.CommandPath() + " --help"
	if c.HasSubCommands() {
		return see
	}
	return c.UseLine() + "; " + see
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use: "holdfast", Short: "Drive a Holdfast daemon", Long: rootHelp,
		SilenceUsage: true, SilenceErrors: true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			err := errors.Join(checkFormat(a.output), cmd.ValidateRequiredFlags(), cmd.ValidateFlagGroups())
			a.parsed = err == nil
			return err
		},
	}
	f := root.PersistentFlags()
	a.server.register(f, os.Getenv)
	f.StringVarP(&a.output, "output", "o", formatTable, "form of the output: table, json or yaml")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{formatTable, formatJSON, formatYAML}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(
		a.volumeCommand(), a.snapshotCommand(), a.templateCommand(), a.attachmentCommand(), a.vmArgsCommand(), a.sandboxCommand(), a.keyCommand(),
		a.workspaceCommand(), a.poolCommand(), a.doctorCommand(), a.auditCommand(), a.benchCommand(), a.demoCommand(), a.versionCommand(),
	)
	return root
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error {
		return c.Help()
	}}
	c.AddCommand(subs...)
	return c
}
