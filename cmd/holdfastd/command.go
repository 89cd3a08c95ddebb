package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"holdfast/internal/daemon"
)

const help = `The node daemon of Holdfast: volumes that outlive their sandboxes.

Settings come from flags, from the environment (HOLDFAST_STATE_DIR for
--state-dir, and so on), from the TOML file of --config (state_dir = "...",
and so on) and from the defaults; the first named wins.

Exit codes:
   0  stopped as asked
   1  failed for another reason than those below
   2  a bug: the runtime gave up, or systemd's watchdog did
   3  another process holds the state directory
   4  this host lacks what the daemon cannot work without
  70  storage failed under the daemon (fail-stop): restart it, it will find out
      what is durable
  78  the command line or the configuration is wrong
A second SIGTERM or SIGINT ends the daemon at once.`

// flags are the settings given on the command line.
type flags struct {
	file  string
	given map[string]string // by setting name
}

func (f *flags) load() (daemon.Config, error) {
	c, err := daemon.Load(daemon.Sources{Flags: f.given, Getenv: daemon.Getenv, File: f.file})
	c.Version = version
	return c, err
}

func command() *cobra.Command {
	f := &flags{given: map[string]string{}}
	root := &cobra.Command{
		Use: "holdfastd", Short: "The node daemon of Holdfast", Long: help, Args: cobra.NoArgs,
		SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return daemon.Usage(err)
			}
			return daemon.Serve(cmd.Context(), c, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	p := root.PersistentFlags()
	p.StringVar(&f.file, "config", "", "TOML file with settings (HOLDFAST_CONFIG)")
	if file, ok := daemon.Getenv("HOLDFAST_CONFIG"); ok {
		f.file = file
	}
	daemon.Names(func(name, flag, kind, usage string) {
		v := p.VarPF(&given{name: name, kind: kind, in: f.given}, flag, "", usage)
		if kind == "bool" {
			v.NoOptDefVal = "true"
		}
	})
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return daemon.Usage(err) })
	root.AddCommand(configCommand(f), rebuildCommand(f), doctorCommand(f), uninstallCommand(f), versionCommand())
	for _, c := range append(root.Commands(), root) {
		c.Args = usageArgs(c.Args)
	}
	return root
}

func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	if check == nil {
		return nil
	}
	return func(cmd *cobra.Command, args []string) error { return daemon.Usage(check(cmd, args)) }
}

// given notes a flag as text; daemon.Load reads it.
type given struct {
	name, kind string
	in         map[string]string
}

var _ pflag.Value = (*given)(nil)

func (g *given) Set(text string) error { g.in[g.name] = text; return nil }
func (g *given) String() string        { return g.in[g.name] }
func (g *given) Type() string          { return g.kind }

func configCommand(f *flags) *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Look at the configuration", Args: cobra.NoArgs}
	c.AddCommand(&cobra.Command{
		Use: "check", Short: "Print the effective configuration, or what is wrong with it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			return errors.Join(c.Write(cmd.OutOrStdout()), daemon.Usage(err))
		},
	})
	return c
}

func rebuildCommand(f *flags) *cobra.Command {
	var yes bool
	var backup string
	c := &cobra.Command{
		Use: "rebuild", Short: "Make new records from what the volumes say of themselves", Args: cobra.NoArgs,
		Long: "Make new records from what volumes, template versions and the side log say of themselves,\n" +
			"when the record store is lost or damaged. The daemon must not run. The old store is moved\n" +
			"aside, not deleted. Attached volumes stay attached. Lost are Idempotency-Keys, and events\n" +
			"newer than a volume's own description.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return daemon.Usage(err)
			}
			if !yes {
				return daemon.Usage(fmt.Errorf("this replaces the record store in %s: say --yes", c.StateDir))
			}
			return daemon.Rebuild(cmd.Context(), c, backup, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	c.Flags().StringVar(&backup, "backup", "", "begin with the records of this backup, for what no image tells; the images win")
	c.Flags().BoolVar(&yes, "yes", false, "really")
	return c
}

func uninstallCommand(f *flags) *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "uninstall", Short: "Unmount what the daemon leaves mounted, so that its directories can be removed", Args: cobra.NoArgs,
		Long: "Unmount the stage, the pool's image and the metadata's, and give their loop devices back.\n" +
			"Refused while a volume is attached or the daemon runs. No file is removed: everything can\n" +
			"be started again, or deleted by hand.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return daemon.Usage(err)
			}
			if !yes {
				return daemon.Usage(fmt.Errorf("this unmounts everything below %s: say --yes", c.StateDir))
			}
			return daemon.Uninstall(cmd.Context(), c, cmd.ErrOrStderr())
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "really")
	return c
}

func doctorCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use: "doctor", Short: "Say what this host has and lacks", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := f.load()
			if err != nil {
				return daemon.Usage(err)
			}
			return daemon.Doctor(cmd.Context(), c, cmd.OutOrStdout())
		},
	}
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "holdfastd "+version)
			return err
		},
	}
}
