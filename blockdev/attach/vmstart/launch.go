package vmstart

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"holdfast/blockdev"
	"holdfast/blockdev/attach"
	"holdfast/blockdev/attach/cloudhypervisor"
	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/qemu"
	"holdfast/blockdev/filesystem"
	"holdfast/internal/sys"
)

// Kata is the VMM of a target whose machine Kata Containers starts.
const Kata = "kata"

// kataVolumes is where Kata's runtime looks for direct-assigned volumes
// (docs/design/direct-blk-device-assignment.md of kata-containers): a directory for
// each, named by its path in base64 of the URL alphabet, with a mountInfo.json.
const kataVolumes = "/run/kata-containers/shared/direct-volumes"

// vmms are what Launch knows to start.
var vmms = map[string]func(Options, attach.Request, filesystem.Type) (attach.Launch, error){
	qemu.Type:            forQEMU,
	firecracker.Type:     forFirecracker,
	cloudhypervisor.Type: forCloudHypervisor,
	Kata:                 forKata,
}

// Launch implements attach.Launcher. blockdev.ErrBusy when the volume is being
// detached.
func (a *Attacher) Launch(_ context.Context, r attach.Request, t filesystem.Type) (attach.Launch, error) {
	l, err := a.launch(r, t)
	return l, blockdev.Op("vmstart.Launch", r.Volume, err)
}

func (a *Attacher) launch(r attach.Request, t filesystem.Type) (attach.Launch, error) {
	tell := vmms[r.Target.VMM]
	if tell == nil {
		return attach.Launch{}, fmt.Errorf("%w: no such VMM: %q", blockdev.ErrInvalid, r.Target.VMM)
	}
	place, err := sys.PlaceBehind(r.Target.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return attach.Launch{}, fmt.Errorf("%w: the attachment's path leads nowhere", blockdev.ErrBusy)
	}
	if err != nil {
		return attach.Launch{}, err
	}
	r.Endpoint.Kind, r.Endpoint.Path = blockdev.File, r.Target.Path
	switch {
	case place.IsBlock():
		r.Endpoint.Kind = blockdev.Block
	case place.IsSocket():
		r.Endpoint.Kind = blockdev.VhostUser
	}
	l, err := tell(a.o, r, t)
	l.Path, l.Pid = r.Target.Path, r.Target.Pid
	return l, err
}

func forQEMU(_ Options, r attach.Request, _ filesystem.Type) (attach.Launch, error) {
	return attach.Launch{Arguments: qemu.Arguments(r)}, nil
}

func forFirecracker(o Options, r attach.Request, _ filesystem.Type) (l attach.Launch, err error) {
	l.Document, err = firecracker.Document(r, o.FirecrackerIO)
	return l, err
}

func forCloudHypervisor(_ Options, r attach.Request, _ filesystem.Type) (l attach.Launch, err error) {
	l.Arguments, err = cloudhypervisor.Arguments(r)
	return l, err
}

// mountInfo is Kata's, of a directly assigned volume.
type mountInfo struct {
	VolumeType string            `json:"volume-type"`
	Device     string            `json:"device"`
	FSType     string            `json:"fstype"`
	Metadata   map[string]string `json:"metadata"`
	Options    []string          `json:"options"`
}

func forKata(_ Options, r attach.Request, t filesystem.Type) (l attach.Launch, err error) {
	if t == filesystem.None {
		return l, fmt.Errorf("%w: Kata mounts a volume in its guest, and this one has no filesystem", blockdev.ErrInvalid)
	}
	info := mountInfo{VolumeType: "block", Device: r.Endpoint.Path, FSType: string(t), Metadata: map[string]string{}, Options: []string{}}
	if r.ReadOnly {
		info.Options = append(info.Options, "ro")
	}
	l.File = path.Join(kataVolumes, base64.URLEncoding.EncodeToString([]byte(r.Endpoint.Path)), "mountInfo.json")
	l.Document, err = json.Marshal(info)
	return l, err
}
