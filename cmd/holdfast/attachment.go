package main

import (
	"github.com/spf13/cobra"

	"holdfast/api/client"
)

func (a *app) attachmentCommand() *cobra.Command {
	c := group("attachment", "Attachments: volumes made visible in sandboxes",
		a.attachmentCreate(), a.attachmentList(), a.attachmentGet(), a.attachmentDelete(), a.attachmentLimits())
	c.Aliases = []string{"attachments", "att"}
	return c
}

func (a *app) attachmentCreate() *cobra.Command {
	var at client.Attachment
	var limits limitFlags
	sockets := vmSockets{}
	c := &cobra.Command{
		Use: "create VOLUME", Short: "Attach a volume to a running container or virtual machine, to a path of the host, or to whoever connects to a socket", Args: cobra.ExactArgs(1),
		Example: "  holdfast attachment create data --holder sandbox:web --container web1 --mount-path /data\n" +
			"  holdfast attachment create data --holder sandbox:job --path /srv/volumes/data --read-only\n" +
			"  holdfast attachment create data --holder sandbox:vm1 --qemu-socket /run/vms/vm1/qmp.sock\n" +
			"  holdfast attachment create data --holder sandbox:vm2 --firecracker-socket /run/vms/vm2/api.sock\n" +
			"  holdfast attachment create data --holder agent:backup --export nbd --read-only",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !setTarget(&at.Target, sockets) {
				return usageError{"give one target: --container ID (runc), --path DIR (on the host), the socket of a virtual machine (--qemu-socket, --firecracker-socket or --cloud-hypervisor-socket PATH), or --export nbd or vhost-user"}
			}
			l, err := limits.read()
			if err != nil {
				return err
			}
			if l != (client.RateLimits{}) {
				at.Limits = &l
			}
			cl, err := a.client()
			if err != nil {
				return err
			}
			made, err := cl.Attach(cmd.Context(), args[0], at)
			if err != nil {
				return err
			}
			return a.showAttachment(made)
		},
	}
	f := c.Flags()
	f.StringVar(&at.Holder, "holder", "", "who uses it: sandbox:NAME or agent:NAME")
	f.StringVar(&at.Target.Container, "container", "", "id of a running runc container")
	f.StringVar(&at.Target.Root, "runc-root", "", "runc's state directory (default: the server's)")
	f.StringVar(&at.Target.Path, "path", "", "directory of the server's host, below an allowed prefix")
	f.StringVar(&sockets.qemu, "qemu-socket", "", "socket of a monitor (QMP) of a running virtual machine, below an allowed prefix")
	f.StringVar(&sockets.firecracker, "firecracker-socket", "", "API socket of a microVM that has not been started, below an allowed prefix")
	f.StringVar(&sockets.cloudHypervisor, "cloud-hypervisor-socket", "", "API socket of a VMM with a virtual machine, below an allowed prefix")
	f.StringVar(&at.Target.Agent, "agent-socket", "", "socket of the VMM that leads to holdfast-guest in the guest, below an allowed prefix")
	f.StringVar(&at.Target.QemuAgent, "qemu-agent-socket", "", "socket of QEMU that leads to its own guest agent, below an allowed prefix")
	f.StringVar(&at.Target.Protocol, "export", "", "nbd or vhost-user: serve it by a socket of the server's host")
	f.StringVar(&sockets.export, "export-link", "", "with --export: where a link to the socket is made, below an allowed prefix")
	f.IntVar(&at.Target.Owner, "export-owner", 0, "with --export: number of a user of the server's host who may connect besides root")
	f.StringSliceVar(&at.Target.Clients, "export-client", nil, "with --transport tls: name in a client's certificate that is let in, for each; none: every certificate of the operator's authority")
	f.StringVar(&at.Target.Transport, "transport", "", "vhost-user: by a worker's socket, also where the virtual machine could open the volume's file; tls, with --export nbd: at a port of the server's host, for clients with a certificate")
	f.StringVar(&at.MountPath, "mount-path", "", "where it shows inside the container, or the guest that has an agent")
	f.BoolVar(&at.Force, "force", false, "take the volume from whoever is in the way, as delete --force does")
	f.BoolVar(&at.ReadOnly, "read-only", false, "readers may be many, a writer is alone")
	limits.register(f)
	_ = c.MarkFlagRequired("holder")
	return c
}

func (a *app) attachmentList() *cobra.Command {
	return &cobra.Command{
		Use: "list VOLUME", Short: "List a volume's attachments", Args: cobra.ExactArgs(1), ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			all, err := cl.Attachments(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.show(all, func(r *rows) {
				r.add("ID", "HOLDER", "TARGET", "MOUNT PATH", "ACCESS", "PHASE", "CREATED")
				for _, at := range all {
					r.add(at.ID, at.Holder, targetText(at.Target), at.MountPath, access(at.ReadOnly), at.Phase, at.CreatedAt)
				}
			})
		},
	}
}

func (a *app) attachmentGet() *cobra.Command {
	return &cobra.Command{
		Use: "get VOLUME ID", Short: "Show an attachment", Args: cobra.ExactArgs(2), ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			at, err := cl.Attachment(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			return a.showAttachment(at)
		},
	}
}

func (a *app) attachmentDelete() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "delete VOLUME ID", Aliases: []string{"detach", "rm"}, Short: "Detach: what was written is durable when this returns", Args: cobra.ExactArgs(2),
		Long: "Detach a volume. While the sandbox has files of it open this is refused, and nothing has changed.\n\n" +
			"With --force it is taken away all the same, and on return the old holder provably cannot write any more: the filesystem is\n" +
			"flushed and shut down, so that its open files answer with errors; what a worker serves (vhost-user, nbd) loses the worker, and\n" +
			"a virtual machine goes on with a disk that answers with errors until it is unplugged. Where neither is possible (btrfs, a pool\n" +
			"without reflinks, a virtual machine that has the image itself) the container or virtual machine is killed. A directory of the\n" +
			"host is refused then. It says what was done.",
		ValidArgsFunction: a.completeAttachments,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			detach := cl.Detach
			if force {
				detach = cl.ForceDetach
			}
			gone, err := detach(cmd.Context(), args[0], args[1])
			if err != nil {
				return err
			}
			did := map[string]string{
				"filesystem": ": its filesystem was shut down", "worker": ": its worker was ended", "sandbox": ": its sandbox was ended",
			}[gone.Fenced]
			a.done("attachment %s of volume %s deleted%s", args[1], args[0], did)
			return nil
		},
	}
	c.Flags().BoolVar(&force, "force", false, "take it away from a holder that does not let go")
	return c
}

func (a *app) showAttachment(at client.Attachment) error {
	return a.show(at, func(r *rows) {
		r.add("ID", at.ID)
		r.add("Holder", at.Holder)
		r.add("Target", targetText(at.Target))
		r.add("Mount path", at.MountPath)
		if at.Launch != nil && at.Target.Protocol != "" && at.Launch.Path != "" {
			r.add("Socket", at.Launch.Path)
		}
		if at.Launch != nil && at.Launch.URI != "" {
			r.add("URI", at.Launch.URI)
		}
		if at.Serial != "" {
			r.add("Serial", at.Serial)
		}
		r.add("Access", access(at.ReadOnly))
		if at.Kind != "" {
			r.add("Kind", at.Kind)
		}
		if at.Socket != "" && (at.Launch == nil || at.Launch.Path != at.Socket) {
			r.add("Worker's socket", at.Socket)
		}
		r.add("Phase", at.Phase)
		limitRows(r, at)
		if at.Remains != "" {
			r.add("Remains", at.Remains)
		}
		if at.Failure != "" {
			r.add("Failure", at.Failure)
		}
		if !at.Deadline.IsZero() {
			r.add("Deadline", at.Deadline)
		}
		if !at.RetryAt.IsZero() {
			r.add("Next try", at.RetryAt)
		}
		r.add("Created", at.CreatedAt)
	})
}

// vmSockets are the flags that name a virtual machine, or where an export gets a name.
type vmSockets struct{ qemu, firecracker, cloudHypervisor, export string }

// setTarget completes a target by what it or a socket names, and reports whether
// that is exactly one.
func setTarget(t *client.Target, s vmSockets) bool {
	for kind, where := range map[string]string{
		"runc": t.Container, "host": t.Path, "export": t.Protocol,
		"qemu": s.qemu, "firecracker": s.firecracker, "cloud-hypervisor": s.cloudHypervisor,
	} {
		switch {
		case where == "":
		case t.Type != "":
			return false
		default:
			t.Type = kind
		}
	}
	t.Socket = s.qemu + s.firecracker + s.cloudHypervisor + s.export
	return t.Type != "" && (t.Type == "export" || s.export == "")
}

func targetText(t client.Target) string {
	if t.VMM != "" {
		return t.Type + ":" + t.VMM
	}
	if t.Protocol != "" {
		return t.Type + ":" + t.Protocol
	}
	return t.Type + ":" + t.Container + t.Path + t.Socket
}

func access(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "read-write"
}
