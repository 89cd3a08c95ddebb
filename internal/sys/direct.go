package sys

import (
	"os"

	"golang.org/x/sys/unix"
)

// directDefault is assumed where the filesystem does not tell: no device in use has
// larger logical blocks.
const directDefault = 4096

// DirectAlignment is what offsets and lengths of I/O on f must be multiples of, in
// bytes, because f was opened with O_DIRECT; 0 when it was not.
func DirectAlignment(f *os.File) (align int, err error) {
	err = control(f, func(fd uintptr) error {
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		if err != nil || flags&unix.O_DIRECT == 0 {
			return err
		}
		var st unix.Statx_t
		if err := retry(func() error {
			return unix.Statx(int(fd), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st)
		}); err != nil {
			return err
		}
		align = directDefault
		if st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align != 0 {
			align = int(st.Dio_offset_align)
		}
		return nil
	})
	return align, wrap("direct I/O", f.Name(), err)
}
