package vmtest

import (
	_ "embed"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"holdfast/internal/guest"
	"holdfast/internal/run"
)

//go:embed boot.S
var bootSource []byte

const (
	sector     = 512
	pieceSize  = 64 * sector // that the boot sector brings at a time
	bootAlign  = 1 << 20
	setupAt    = 0x10000 // where the boot sector enters the kernel
	linesAt    = setupAt + 0xe000
	kernelAt   = 1 << 20
	initrdAt   = 1 << 29 // far above where the kernel unpacks itself
	tableAt    = 0x180   // in the boot sector
	partsAt    = 446
	linuxParts = 0x83
)

// BootDisk writes a disk that a machine's firmware boots (Options.Firmware) and that has
// all that the guest needs: boot sector, kernel, initramfs, and a root filesystem in the
// first partition. The second partition is what is left of size, in bytes, and blank.
func BootDisk(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := guest.Parts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	disk, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	kernel, initrd, root := read(t, f.Kernel), read(t, f.Initrd), read(t, f.Root)
	boot := assemble(t)
	at := int64(pieceSize) // of what comes next
	put := func(b []byte, align int64) (offset int64) {
		at = (at + align - 1) / align * align
		offset = at
		if _, err := disk.WriteAt(b, offset); err != nil {
			t.Fatal(err)
		}
		at += int64(len(b))
		return offset
	}
	setup := sector * (int64(kernel[0x1f1]) + 1)
	prepare(kernel, len(initrd))
	entry := boot[tableAt:]
	load := func(offset, length, address int64) {
		for i, v := range []int64{offset / sector, (length + pieceSize - 1) / pieceSize, address} {
			binary.LittleEndian.PutUint32(entry[4*i:], uint32(v)) //nolint:gosec // all are small
		}
		entry = entry[12:]
	}
	lines := put([]byte(f.CommandLine+" guest_root=vda1\x00"), sector)
	code := put(kernel, sector)
	load(code, setup, setupAt)
	load(lines, 1, linesAt)
	load(code+setup, int64(len(kernel))-setup, kernelAt)
	load(put(initrd, sector), int64(len(initrd)), initrdAt)
	first := put(root, bootAlign)
	end := (at + sector - 1) / sector * sector
	second := (at + bootAlign - 1) / bootAlign * bootAlign
	for i, p := range []struct{ from, to int64 }{{first, end}, {second, size}} {
		entry := boot[partsAt+16*i:]
		entry[4] = linuxParts
		binary.LittleEndian.PutUint32(entry[8:], uint32(p.from/sector))         //nolint:gosec // all are small
		binary.LittleEndian.PutUint32(entry[12:], uint32((p.to-p.from)/sector)) //nolint:gosec // all are small
	}
	if _, err := disk.WriteAt(boot, 0); err != nil {
		t.Fatal(err)
	}
	if err := disk.Truncate(size); err != nil || second >= size {
		t.Fatalf("a disk of %d bytes is too small: %v", size, err)
	}
}

// prepare fills in what a boot loader tells the kernel (boot protocol 2.02, the header
// at 0x1f1).
func prepare(kernel []byte, initrd int) {
	const canUseHeap = 1 << 7
	kernel[0x210] = 0xff // a loader without a number
	kernel[0x211] |= canUseHeap
	binary.LittleEndian.PutUint32(kernel[0x218:], initrdAt)
	binary.LittleEndian.PutUint32(kernel[0x21c:], uint32(initrd)) //nolint:gosec // a few MB
	binary.LittleEndian.PutUint16(kernel[0x224:], linesAt-setupAt-0x200)
	binary.LittleEndian.PutUint32(kernel[0x228:], linesAt)
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// assemble makes the boot sector.
func assemble(t testing.TB) []byte {
	t.Helper()
	dir := t.TempDir()
	source, object, out := filepath.Join(dir, "boot.S"), filepath.Join(dir, "boot.o"), filepath.Join(dir, "boot")
	if err := os.WriteFile(source, bootSource, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"as", "--32", "-o", object, source},
		{"ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-e", "_start", "-o", out, object},
	} {
		if _, err := run.Run(t.Context(), run.Cmd{Args: args}); err != nil {
			t.Fatal(err)
		}
	}
	return read(t, out)
}
