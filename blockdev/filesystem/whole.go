package filesystem

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"holdfast/internal/run"
)

var (
	// ErrForeign: the device does not hold one filesystem of the type and nothing
	// else: it has a partition table, another format's header, or a size that does
	// not fit.
	ErrForeign = errors.New("the device is not that filesystem as a whole")
	// ErrNeedsRepair: the checker would have to decide something.
	ErrNeedsRepair = errors.New("the filesystem needs a repair that its owner must decide on")
)

// headers are what other formats begin with: programs that guess would take the
// device for theirs.
var headers = []struct {
	at    int
	magic string
	name  string
}{
	{0, "QFI\xfb", "a qcow2 image"}, {0, "QED\x00", "a QED image"}, {0, "KDMV", "a VMDK image"}, {0, "COWD", "a VMDK image"},
	{0, "vhdxfile", "a VHDX image"}, {0, "conectix", "a VHD image"}, {64, "\x7f\x10\xda\xbe", "a VDI image"}, {0, "WithoutFreeSpace", "a Parallels image"},
	{0, "LUKS\xba\xbe", "an encrypted device (LUKS)"}, {512, "LABELONE", "a physical volume of LVM"}, {512, "EFI PART", "a partition table (GPT)"},
}

// Whole is nil when a device that a guest may have written holds one filesystem of
// type t throughout, as far as its first bytes and its superblock tell; it is read by
// code of ours. ErrForeign or ErrDamaged, with the reason, otherwise.
func (x Tools) Whole(ctx context.Context, path string, t Type) error {
	if err := ctx.Err(); err != nil {
		return failed("check", t, err)
	}
	return failed("check", t, x.whole(ctx, path, t))
}

func (x Tools) whole(ctx context.Context, path string, t Type) error {
	if t == None {
		return errors.ErrUnsupported
	}
	device, err := deviceSize(path)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := readAt(f, 0, 1024)
	if err != nil {
		return err
	}
	for _, h := range headers {
		if bytes.HasPrefix(b[h.at:], []byte(h.magic)) {
			return fmt.Errorf("%w: it begins like %s", ErrForeign, h.name)
		}
	}
	if partitioned(b[:512]) {
		return fmt.Errorf("%w: it has a partition table (MBR)", ErrForeign)
	}
	size, err := x.Size(ctx, path, t)
	switch {
	case err != nil:
		return err
	case size > device:
		return fmt.Errorf("%w: a filesystem of %d bytes on a device of %d", ErrForeign, size, device)
	case size < t.Minimum():
		return fmt.Errorf("%w: a filesystem of %d bytes, and the least is %d", ErrForeign, size, t.Minimum())
	}
	return nil
}

// partitioned reports whether a first sector has the signature and an entry of a
// partition table.
func partitioned(b []byte) bool {
	const entries, entry, signature = 446, 16, 0xAA55
	if binary.LittleEndian.Uint16(b[510:]) != signature {
		return false
	}
	for n := range 4 {
		e := b[entries+n*entry:]
		if (e[0] == 0 || e[0] == 0x80) && e[4] != 0 && binary.LittleEndian.Uint32(e[12:]) != 0 {
			return true
		}
	}
	return false
}

// Preen makes an unmounted ext4 that a guest has written consistent as far as that is
// nobody's decision: the journal is replayed and counts are put right (e2fsck -p).
// Before that Whole must be nil. ErrNeedsRepair, with nothing decided, when the
// checker would ask its operator; ErrForeign and ErrDamaged as Whole.
func (x Tools) Preen(ctx context.Context, path string) error {
	err := x.whole(ctx, path, Ext4)
	if err == nil {
		w := x.at(path)
		err = w.leave(preened(w.run(ctx, []int{fsckCorrected, fsckReboot, fsckCorrected | fsckReboot}, []string{"e2fsck", "-f", "-p"})))
	}
	return failed("preen", Ext4, err)
}

// preened reads the error of e2fsck -p: 4 is errors left, 8 what it cannot work on
// (e2fsck(8)).
func preened(err error) error {
	var e *run.Error
	if errors.As(err, &e) && e.Code > 0 && e.Code < 16 {
		return fmt.Errorf("%w: %w", ErrNeedsRepair, err)
	}
	return err
}
