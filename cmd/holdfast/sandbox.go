package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
	"holdfast/internal/bytesize"
)

func (a *app) sandboxCommand() *cobra.Command {
	c := group("sandbox", "Sandboxes: containers of this server with volumes in them",
		a.sandboxCreate(), a.sandboxList(), a.sandboxGet(), a.sandboxExec(), a.sandboxDelete())
	c.Aliases = []string{"sandboxes", "sbx"}
	return c
}

func (a *app) sandboxCreate() *cobra.Command {
	var s client.Sandbox
	var volumes, ephemerals, envs []string
	var memory string
	c := &cobra.Command{
		Use: "create [NAME]", Short: "Start a sandbox with volumes", Args: cobra.MaximumNArgs(1),
		Example: "  holdfast sandbox create web --volume data:/data --volume models:/models:ro\n" +
			"  holdfast sandbox create job --ephemeral 1GiB:/scratch --memory 2GiB --env MODE=fast",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				s.Metadata.Name = args[0]
			}
			err := errors.Join(addVolumes(&s, volumes), addEphemerals(&s, ephemerals), addEnvs(&s, envs))
			if memory != "" {
				n, e := bytesize.Parse(memory, 1<<20)
				s.Spec.Runtime.Memory, err = n>>20, errors.Join(err, e)
			}
			if err != nil {
				return usageError{err.Error()}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			made, err := cl.CreateSandbox(cmd.Context(), s)
			if err != nil {
				return err
			}
			return a.showSandbox(made)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&volumes, "volume", nil, "VOLUME:PATH, or VOLUME:PATH:ro to only read; may be repeated")
	f.StringArrayVar(&ephemerals, "ephemeral", nil, "SIZE:PATH: a volume that goes with the sandbox; may be repeated")
	f.StringArrayVar(&envs, "env", nil, "NAME=VALUE for every process; may be repeated")
	f.StringVar(&s.Spec.Runtime.Image, "image", "", "root filesystem, by a name that the server's operator configured (default: a minimal one)")
	f.StringVar(&memory, "memory", "", "most memory (default 512MiB)")
	f.StringVar(&s.Spec.Region, "region", "", "region (default: its volumes')")
	return c
}

func addVolumes(s *client.Sandbox, texts []string) error {
	for _, text := range texts {
		name, path, ok := strings.Cut(text, ":")
		path, readOnly := strings.CutSuffix(path, ":ro")
		if !ok || name == "" || path == "" {
			return fmt.Errorf("--volume: %q is not VOLUME:PATH or VOLUME:PATH:ro", text)
		}
		s.Spec.Volumes = append(s.Spec.Volumes, client.VolumeMount{Name: name, MountPath: path, ReadOnly: readOnly})
	}
	return nil
}

func addEphemerals(s *client.Sandbox, texts []string) error {
	for i, text := range texts {
		size, path, ok := strings.Cut(text, ":")
		n, err := bytesize.Parse(size, 1<<20)
		if !ok || err != nil || path == "" {
			return fmt.Errorf("--ephemeral: %q is not SIZE:PATH", text)
		}
		s.Spec.Volumes = append(s.Spec.Volumes, client.VolumeMount{
			Name: "ephemeral-" + strconv.Itoa(i), MountPath: path, Type: "ephemeral", SizeMB: (n + 1<<20 - 1) >> 20,
		})
	}
	return nil
}

func addEnvs(s *client.Sandbox, texts []string) error {
	for _, text := range texts {
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			return fmt.Errorf("--env: %q is not NAME=VALUE", text)
		}
		s.Spec.Runtime.Envs = append(s.Spec.Runtime.Envs, client.EnvVar{Name: name, Value: value})
	}
	return nil
}

func (a *app) sandboxList() *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the sandboxes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			all, err := cl.Sandboxes(cmd.Context())
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) {
				r.add("NAME", "STATUS", "IMAGE", "MEMORY", "VOLUMES", "CREATED")
				for _, s := range all {
					r.add(s.Metadata.Name, s.Status, s.Spec.Runtime.Image, mib(s.Spec.Runtime.Memory), mountsText(s.Spec.Volumes), s.Metadata.CreatedAt)
				}
			})
		},
	}
}

func mountsText(mounts []client.VolumeMount) string {
	texts := make([]string, len(mounts))
	for i, m := range mounts {
		texts[i] = m.Name + ":" + m.MountPath
		if m.ReadOnly {
			texts[i] += ":ro"
		}
	}
	return strings.Join(texts, " ")
}

func (a *app) sandboxGet() *cobra.Command {
	return &cobra.Command{
		Use: "get NAME", Short: "Show a sandbox", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			s, err := cl.Sandbox(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.showSandbox(s)
		},
	}
}

func (a *app) showSandbox(s client.Sandbox) error {
	return a.show(s, func(r *rows) {
		r.add("Name", s.Metadata.Name)
		r.add("Status", s.Status)
		r.add("Image", s.Spec.Runtime.Image)
		r.add("Memory", mib(s.Spec.Runtime.Memory))
		r.add("Region", s.Spec.Region)
		r.add("Volumes", mountsText(s.Spec.Volumes))
		r.add("URL", s.Metadata.URL)
		r.add("Created", s.Metadata.CreatedAt)
		for _, e := range s.Events {
			r.add("Event", e.Time, e.Message)
		}
	})
}

// exitError makes the CLI end as the command in the sandbox did.
type exitError struct{ code int }

func (e exitError) Error() string { return "the command ended with " + strconv.Itoa(e.code) }

func (a *app) sandboxExec() *cobra.Command {
	var e client.Exec
	var timeout time.Duration
	c := &cobra.Command{
		Use: "exec NAME -- COMMAND [ARG...]", Short: "Run a command in a sandbox, and end as it ends", Args: cobra.MinimumNArgs(2),
		Long: "One COMMAND is a line for the sandbox's shell; with arguments each word is one word there.\n" +
			"There is no input and no terminal; output is shown when the command has ended.",
		Example:           "  holdfast sandbox exec web -- df -h /data\n  holdfast sandbox exec web 'echo hello > /data/hello'",
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			e.Command = args[1]
			if len(args) > 2 {
				e.Command = quoteWords(args[1:])
			}
			e.Wait, e.Timeout = true, timeout.Seconds()
			cl, err := a.client()
			if err != nil {
				return err
			}
			p, err := runToEnd(cmd.Context(), cl, args[0], e)
			if err != nil {
				return err
			}
			if a.output != formatTable {
				err = a.show(p, nil)
			} else {
				_, err1 := io.WriteString(a.out, p.Stdout)
				_, err2 := io.WriteString(a.errOut, p.Stderr)
				err = errors.Join(err1, err2)
			}
			if err == nil && p.ExitCode != 0 {
				err = exitError{p.ExitCode}
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&e.Dir, "dir", "", "working directory (default: the image's)")
	f.DurationVar(&timeout, "timeout", 0, "kill it after this time (default: never)")
	return c
}

// runToEnd waits longer than one answer takes.
func runToEnd(ctx context.Context, cl *client.Client, sandbox string, e client.Exec) (client.Process, error) {
	p, err := cl.Exec(ctx, sandbox, e)
	for err == nil && p.Status == "running" {
		select {
		case <-ctx.Done():
			return p, ctx.Err()
		case <-time.After(time.Second):
		}
		p, err = cl.Process(ctx, sandbox, p.PID)
	}
	return p, err
}

// quoteWords writes words as a shell reads them back.
func quoteWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

func (a *app) sandboxDelete() *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME...", Aliases: []string{"rm"}, Short: "End sandboxes; their volumes are free when this returns", Args: cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			for _, name := range args {
				_, err := cl.DeleteSandbox(cmd.Context(), name)
				if err == nil {
					err = cl.AwaitSandboxGone(cmd.Context(), name)
				}
				if err != nil {
					return err
				}
				a.done("sandbox %s deleted", name)
			}
			return nil
		},
	}
}

func (a *app) completeSandboxes(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 && cmd.Name() != "delete" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeWith(cmd, func(ctx context.Context, cl *client.Client) (names []string, err error) {
		all, err := cl.Sandboxes(ctx)
		for _, s := range all {
			names = append(names, s.Metadata.Name)
		}
		return names, err
	})
}
