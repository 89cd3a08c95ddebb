package filesystem

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"holdfast/blockdev/filesystem/internal/ext4disk"
	"holdfast/internal/run"
)

// e2fsck's exit code is a sum of these (e2fsck(8)).
const (
	fsckCorrected = 1
	fsckReboot    = 2
)

// checkExt4 does not judge a filesystem without repair while its journal holds
// what belongs into it: that is ErrDirty.
func (w *workplace) checkExt4(ctx context.Context, repair bool) error {
	s, damage := readExt4Super(w.path)
	if damage != nil && (!repair || !errors.Is(damage, ErrDamaged)) {
		return damage
	}
	mode, ok := "-n", []int(nil)
	switch {
	case repair:
		mode, ok = "-y", []int{fsckCorrected, fsckCorrected | fsckReboot, fsckReboot}
	case s.dirty():
		return ErrDirty
	}
	err := w.run(ctx, ok, []string{"e2fsck", "-f", mode})
	if err != nil && damage != nil {
		return errors.Join(damage, err)
	}
	return classifyCheck(err)
}

// growExt4 goes by what the superblock says, so that it can be cut anywhere and
// run again: the mark "not clean" is durable before the first change and taken
// away only after everything is.
func (x Tools) growExt4(ctx context.Context, path string) error {
	device, err := deviceSize(path)
	if err != nil {
		return err
	}
	s, err := readExt4Super(path)
	if err == nil && s.clean() && s.size() > device {
		return damaged("ext4 of %d bytes on a device of %d bytes", s.size(), device)
	}
	if err == nil && s.grown(device) {
		return nil
	}
	w := x.at(path)
	if err := w.leave(w.enlargeExt4(ctx, device)); err != nil {
		return err
	}
	return markExt4(path, true)
}

// enlargeExt4 is what growExt4 does between the marks, with tools.
func (w *workplace) enlargeExt4(ctx context.Context, device int64) error {
	if err := w.checkExt4(ctx, true); err != nil {
		return err
	}
	s, err := readExt4Super(w.path)
	if err != nil {
		return err
	}
	if s.size() > device {
		return damaged("ext4 of %d bytes on a device of %d bytes", s.size(), device)
	}
	if s.grown(device) { // the check repaired what was left to do
		return nil
	}
	if err := markExt4(w.path, false); err != nil {
		return err
	}
	return w.resizeExt4(ctx, s, device)
}

// resizeExt4 makes a checked filesystem fill its device and gives it the
// journal of its size class: a small one was made without, or with a small one.
func (w *workplace) resizeExt4(ctx context.Context, s *ext4Super, device int64) error {
	if !s.fills(device) {
		// -f: the filesystem is marked not clean by us, and was checked just now.
		blocks := strconv.FormatInt(device/s.blockSize, 10)
		if err := w.run(ctx, nil, []string{"resize2fs", "-f"}, blocks); err != nil {
			return classifyResize(err)
		}
		if err := markInodeTablesZeroed(w.path); err != nil {
			return err
		}
	}
	if !s.wantsJournal(device) {
		return nil
	}
	if s.hasJournal() {
		if err := w.run(ctx, nil, []string{"tune2fs", "-O", "^has_journal"}); err != nil {
			return err
		}
	}
	return w.run(ctx, nil, []string{"tune2fs", "-J", fmt.Sprintf("size=%d", ext4JournalFor(device)/MiB)})
}

// classifyResize knows the one thing that resize2fs cannot do: 1 KiB blocks, of
// small filesystems, end below 2 TiB.
func classifyResize(err error) error {
	var e *run.Error
	if errors.As(err, &e) && strings.Contains(e.Stderr, "too many block group descriptors") {
		return fmt.Errorf("%w: an ext4 made with less than %d MiB cannot become so large (%w)",
			errors.ErrUnsupported, ext4JournalFrom/MiB, err)
	}
	return err
}

// markExt4 durably sets or clears the mark that the filesystem is consistent,
// after making durable all that was written before.
func markExt4(path string, clean bool) error {
	f, err := openExclusive(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := syncFile(f); err != nil {
		return err
	}
	b, err := readAt(f, ext4SuperOffset, ext4SuperBytes)
	if err != nil {
		return err
	}
	s, err := parseExt4Super(b)
	if err != nil {
		return err
	}
	state := s.state &^ ext4StateClean
	if clean {
		state |= ext4StateClean
	}
	binary.LittleEndian.PutUint16(b[0x3A:], state)
	binary.LittleEndian.PutUint32(b[ext4disk.SuperSumAt:], ext4disk.SuperSum(b))
	if _, err := f.WriteAt(b, ext4SuperOffset); err != nil {
		return err
	}
	return syncFile(f)
}

// grown reports that there is nothing to do.
func (s *ext4Super) grown(device int64) bool {
	return s.clean() && s.fills(device) && !s.wantsJournal(device)
}

// wantsJournal reports that the journal is missing or a quarter, or less, of
// what the device's size class has.
func (s *ext4Super) wantsJournal(device int64) bool {
	want := ext4JournalFor(device)
	return want != 0 && s.journalSize*4 <= want
}

// fills reports that the filesystem has all blocks of the device that it can
// use. resize2fs leaves a last group away that would hold little besides its
// own metadata.
func (s *ext4Super) fills(device int64) bool {
	left := device/s.blockSize - s.blocks
	if left <= 0 {
		return true
	}
	firstBlock := int64(0)
	if s.blockSize == 1024 {
		firstBlock = 1
	}
	used := s.blocks - firstBlock
	return used%s.blocksPerGroup == 0 && left < s.groupOverhead(used/s.blocksPerGroup)+50
}

// groupOverhead is the blocks that group g needs for itself.
func (s *ext4Super) groupOverhead(g int64) int64 {
	overhead := 2 + s.inodesPerGroup*s.inodeSize/s.blockSize
	if ext4disk.HasSuperCopy(g) {
		overhead += 1 + ((g+1)*s.descriptorSize()+s.blockSize-1)/s.blockSize + s.reservedGDT
	}
	return overhead
}

// descriptorSize is the bytes of a group descriptor.
func (s *ext4Super) descriptorSize() int64 {
	if s.incompat&ext4Incompat64bit != 0 {
		return 64
	}
	return 32
}

// classifyCheck reads the error of a checker: an exit that reports damage is
// ErrDamaged, one that reports trouble of its own is not.
func classifyCheck(err error) error {
	var e *run.Error
	if errors.As(err, &e) && e.Code > 0 && e.Code < 8 {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return err
}
