package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/api/client"
)

func (a *app) vmArgsCommand() *cobra.Command {
	at := client.Attachment{Target: client.Target{Type: "vm"}}
	var size string
	var ephemeral bool
	made := client.Ephemeral{}
	c := &cobra.Command{
		Use: "vm-args VOLUME", Short: "Attach a volume to a virtual machine that is to be started, and print what it is started with", Args: cobra.ExactArgs(1),
		Long: "Attach a volume to a virtual machine that does not run yet, and print what to start it with: arguments of QEMU and Cloud\n" +
			"Hypervisor, the Drive of Firecracker's API, the mountInfo.json of Kata. The same again finds the attachment and prints the same.\n\n" +
			"The image has a path for this attachment alone. When the machine's process ends the volume is detached, and the path is gone:\n" +
			"run this before each start. An attachment that was never used stays until it is detached.\n\n" +
			"A volume that a machine could write is never mounted by the server's host again.",
		Example: "  qemu-system-x86_64 -m 1G -drive file=root.qcow2 $(holdfast vm-args data)\n" +
			"  cloud-hypervisor --kernel vmlinux $(holdfast vm-args data --vmm cloud-hypervisor)\n" +
			"  holdfast vm-args data --vmm firecracker --read-only\n" +
			"  holdfast vm-args scratch --ephemeral --size 2GiB",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if at.Holder == "" {
				at.Holder = "sandbox:" + args[0]
			}
			if ephemeral {
				n, err := parseMiB(size)
				if err != nil {
					return err
				}
				made.SizeMiB, at.Ephemeral = n, &made
			} else if size != "" || made.Template != "" || made.Filesystem != "" {
				return usageError{"--size, --template and --filesystem are of a volume that is made: give --ephemeral, or make it first (holdfast volume create)"}
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			attached, err := cl.Attach(cmd.Context(), args[0], at)
			if err != nil {
				return err
			}
			return a.showLaunch(attached)
		},
	}
	f := c.Flags()
	f.StringVar(&at.Target.VMM, "vmm", "qemu", "what runs the machine: qemu, firecracker, cloud-hypervisor or kata")
	f.StringVar(&at.Holder, "holder", "", "who uses it: sandbox:NAME or agent:NAME (default: sandbox:VOLUME)")
	f.StringVar(&at.Target.Socket, "vm-socket", "", "where the machine's monitor (QMP) or API will listen, below an allowed prefix: it is told of growth there")
	f.StringVar(&at.Target.Transport, "transport", "", "vhost-user: by a worker's socket, for a machine of qemu or cloud-hypervisor whose memory is shared")
	f.BoolVar(&at.ReadOnly, "read-only", false, "readers may be many, a writer is alone")
	f.BoolVar(&at.Force, "force", false, "take the volume from whoever is in the way, as attachment delete --force does")
	f.BoolVar(&ephemeral, "ephemeral", false, "make the volume, and delete it when the machine ends or the volume is detached")
	f.StringVar(&size, "size", "", "of an ephemeral volume: MiB, or with a unit (512MiB, 2GiB)")
	f.StringVar(&made.Template, "template", "", "of an ephemeral volume: NAME, NAME:N or NAME:latest")
	f.StringVar(&made.Filesystem, "filesystem", "", "of an ephemeral volume: ext4 (default), xfs, btrfs or none")
	_ = c.RegisterFlagCompletionFunc("vmm", cobra.FixedCompletions([]string{"qemu", "firecracker", "cloud-hypervisor", "kata"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// showLaunch prints arguments as words on one line, so that a shell can take them.
func (a *app) showLaunch(at client.Attachment) error {
	l := at.Launch
	if l == nil {
		return fmt.Errorf("the server does not say how to start a machine with attachment %s", at.ID)
	}
	if l.Process != 0 {
		fmt.Fprintf(a.errOut, "holdfast: process %d has the volume open already\n", l.Process)
	}
	if l.File != "" {
		fmt.Fprintf(a.errOut, "holdfast: for %s, volume path %s\n", l.File, l.Path)
	}
	if a.output != formatTable {
		return a.show(at, nil)
	}
	text := string(l.Document)
	if len(l.Arguments) > 0 {
		words := make([]string, len(l.Arguments))
		for i, w := range l.Arguments {
			words[i] = shellWord(w)
		}
		text = strings.Join(words, " ")
	}
	_, err := fmt.Fprintln(a.out, text)
	return err
}

// shellWord quotes a word where a shell would not leave it as it is.
func shellWord(w string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_=./,:+@%", r)
	}
	if w != "" && strings.IndexFunc(w, func(r rune) bool { return !plain(r) }) < 0 {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}
