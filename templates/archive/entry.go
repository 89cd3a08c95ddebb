package archive

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"holdfast/blockdev/tree"
)

// ErrRefused is in the chain of every error that is the archive's own fault.
var ErrRefused = errors.New("archive refused")

// The rules for a single entry. Sizes are in bytes.
const (
	maxPath      = tree.MaxPath // of a path or a link's text
	maxName      = 255          // of one component
	maxDepth     = tree.MaxDepth
	maxAttrName  = 255
	maxAttrBytes = tree.MaxXattrs    // of an entry: what an ext4 block holds
	maxOwner     = 1<<32 - 2         // the last one means "unchanged" to chown
	maxSize      = tree.MaxFileBytes // of one file
	attrOverhead = tree.XattrExtra   // of an attribute
	attrRecord   = "SCHILY.xattr."
	aclRecord    = "SCHILY.acl."
	hostLabel    = "security.selinux" // left out: it is a host's policy, not the tree's
)

// kind is what an entry makes.
type kind uint8

const (
	directory kind = iota + 1
	regular
	symlink
	hardlink
)

func (k kind) String() string {
	return [...]string{"nothing", "directory", "file", "symbolic link", "hard link"}[k]
}

// entry is one entry of an archive, checked by the rules that need no other entry.
type entry struct {
	kind  kind
	path  string // clean and relative; "." is the root itself
	link  string // symlink: the text as it is; hardlink: the clean path of its target
	size  int64  // of a regular file
	mode  uint32 // permission bits, 07777
	uid   int
	gid   int
	time  time.Time
	attrs []tree.Xattr // in any order
}

// reader gives the entries of an archive one by one; file contents are read from
// it between two calls of next.
type reader struct {
	*tar.Reader
	tail  *tail
	count int64  // entries so far
	last  string // the entry before, for messages about damage
}

func newReader(r io.Reader) *reader {
	t := &tail{r: r}
	return &reader{Reader: tar.NewReader(t), tail: t}
}

// next gives the next entry; io.EOF after the last.
func (r *reader) next() (entry, error) {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return entry{}, r.end()
		}
		if err != nil {
			return entry{}, r.damaged(err)
		}
		r.count++
		r.last = h.Name
		if h.Typeflag == tar.TypeXGlobalHeader {
			if err := globalHeader(h); err != nil {
				return entry{}, err
			}
			continue
		}
		e, err := newEntry(h)
		if err != nil {
			return entry{}, refuse(h.Name, "%w", err)
		}
		return e, nil
	}
}

// end tells whether an archive that has no more entries is complete.
func (r *reader) end() error {
	switch {
	case r.tail.total == 0:
		return refused("the archive is empty (0 bytes)")
	case !r.tail.zero():
		return refused("the archive ends after %s without the two zero blocks that end a tar: it was cut off", Quote(r.last))
	}
	return io.EOF
}

// damaged explains an error of the tar reader.
func (r *reader) damaged(err error) error {
	where := "at its first entry"
	if r.count > 0 {
		where = fmt.Sprintf("after entry %d (%s)", r.count, Quote(r.last))
	}
	format := r.tail.format()
	switch {
	case errors.Is(r.tail.err, ErrRefused): // by a decompressor, for example
		return refused("%w %s", r.tail.err, where)
	case r.tail.err != nil && !errors.Is(r.tail.err, io.EOF):
		return r.tail.err // not the archive's fault
	case r.count == 0 && format != "":
		return refused("this is a %s file: send a tar, tar.gz, tar.zst or zip", format)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return refused("the archive is cut off %s", where)
	case errors.Is(err, tar.ErrFieldTooLong):
		return refused("a header is longer than 1 MiB %s", where)
	case errors.Is(err, tar.ErrHeader):
		return refused("not a tar header %s", where)
	}
	return refused("%w %s", err, where)
}

// globalHeader accepts what "git archive" writes, and nothing that would have to
// change the entries that follow.
func globalHeader(h *tar.Header) error {
	for key := range h.PAXRecords {
		if key != "comment" {
			return refuse(h.Name, "global header with %s: put it into each entry", Quote(key))
		}
	}
	return nil
}

// newEntry checks a header by itself. Its errors are the rule that was broken.
func newEntry(h *tar.Header) (entry, error) {
	e := entry{mode: uint32(h.Mode & 0o7777), uid: h.Uid, gid: h.Gid, time: h.ModTime} //nolint:gosec // masked
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		e.kind, e.size = regular, h.Size
	case tar.TypeDir:
		e.kind = directory
	case tar.TypeSymlink:
		e.kind = symlink
	case tar.TypeLink:
		e.kind = hardlink
	case tar.TypeChar, tar.TypeBlock:
		return e, errors.New("device nodes are not allowed")
	case tar.TypeFifo:
		return e, errors.New("named pipes are not allowed")
	default:
		return e, fmt.Errorf("entries of type %q are not known", h.Typeflag)
	}
	var err error
	if e.path, err = cleanPath(h.Name); err != nil {
		return e, err
	}
	if e.path == "." && e.kind != directory {
		return e, fmt.Errorf("a %s cannot be the root", e.kind)
	}
	if err = e.setLink(h.Linkname); err != nil {
		return e, err
	}
	if e.attrs, err = attributes(h.PAXRecords, e.kind); err != nil {
		return e, err
	}
	return e, e.checkNumbers()
}

func (e *entry) setLink(text string) (err error) {
	switch e.kind {
	case symlink:
		switch {
		case text == "":
			return errors.New("a symbolic link without a target")
		case len(text) >= maxPath:
			return fmt.Errorf("a symbolic link's target is longer than %d bytes", maxPath-1)
		case strings.IndexByte(text, 0) >= 0:
			return errors.New("a NUL byte in a symbolic link's target")
		}
		e.link = text
	case hardlink:
		if e.link, err = cleanPath(text); err != nil {
			return fmt.Errorf("target of a hard link: %w", err)
		}
		if e.link == e.path {
			return errors.New("a hard link to itself")
		}
	}
	return nil
}

func (e *entry) checkNumbers() error {
	switch {
	case e.uid < 0 || e.uid > maxOwner || e.gid < 0 || e.gid > maxOwner:
		return fmt.Errorf("owner %d:%d is outside 0 to %d", e.uid, e.gid, maxOwner)
	case e.size < 0 || e.size > maxSize:
		return fmt.Errorf("a file of %d bytes: the most is %d", e.size, int64(maxSize))
	case e.time.Before(tree.FirstTime) || e.time.After(tree.LastTime):
		return fmt.Errorf("modification time %d is outside the years 1901 to 2446", e.time.Unix())
	}
	return nil
}

// cleanPath gives a relative path without "." components, doubled or trailing
// slashes; "." for the root. Only the text is changed, never its meaning.
func cleanPath(name string) (string, error) {
	switch {
	case name == "":
		return "", errors.New("an empty name")
	case len(name) > maxPath:
		return "", fmt.Errorf("a path longer than %d bytes", maxPath)
	case strings.IndexByte(name, 0) >= 0:
		return "", errors.New("a NUL byte in a name")
	case name[0] == '/':
		return "", errors.New("an absolute path: paths must be relative to the template's root")
	}
	if isClean(name) {
		return name, checkParts(strings.Split(name, "/"))
	}
	parts := slices.DeleteFunc(strings.Split(name, "/"), func(p string) bool { return p == "" || p == "." })
	if len(parts) == 0 {
		return ".", nil
	}
	return strings.Join(parts, "/"), checkParts(parts)
}

func isClean(name string) bool {
	return name != "." && !strings.HasPrefix(name, "./") && !strings.HasSuffix(name, "/") &&
		!strings.HasSuffix(name, "/.") && !strings.Contains(name, "//") && !strings.Contains(name, "/./")
}

func checkParts(parts []string) error {
	if len(parts) > maxDepth {
		return fmt.Errorf("deeper than %d directories", maxDepth)
	}
	for _, p := range parts {
		switch {
		case p == "..":
			return errors.New(`a ".." in a path: paths must stay inside the template`)
		case len(p) > maxName:
			return fmt.Errorf("a name longer than %d bytes", maxName)
		}
	}
	return nil
}

// attributes picks the extended attributes out of an entry's PAX records.
func attributes(records map[string]string, k kind) ([]tree.Xattr, error) {
	var attrs []tree.Xattr
	total := 0
	for key, value := range records {
		if strings.HasPrefix(key, aclRecord) {
			return nil, fmt.Errorf("%s is an ACL as text: send it as system.posix_acl_* (tar --xattrs --xattrs-include='*')", Quote(key))
		}
		name, ok := strings.CutPrefix(key, attrRecord)
		if !ok || name == hostLabel {
			continue
		}
		if err := checkAttr(name, k); err != nil {
			return nil, err
		}
		total += len(name) + len(value) + attrOverhead
		attrs = append(attrs, tree.Xattr{Name: name, Value: []byte(value)})
	}
	if total > maxAttrBytes {
		return nil, fmt.Errorf("extended attributes of %d bytes together: the most is %d", total, maxAttrBytes)
	}
	return attrs, nil
}

func checkAttr(name string, k kind) error {
	switch {
	case len(name) > maxAttrName || strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("extended attribute %s: its name is longer than %d bytes or has a NUL byte", Quote(name), maxAttrName)
	case k == hardlink:
		return nil // belongs to the inode, which has it already
	case strings.HasPrefix(name, "user.") && len(name) > len("user."):
		if k == symlink {
			return fmt.Errorf("extended attribute %s on a symbolic link, which Linux does not allow", Quote(name))
		}
		return nil
	case strings.HasPrefix(name, "trusted.") && len(name) > len("trusted."):
		return nil
	case name == "security.capability" && k == regular:
		return nil
	case name == "system.posix_acl_access" && k != symlink, name == "system.posix_acl_default" && k == directory:
		return nil
	}
	return fmt.Errorf("extended attribute %s on a %s is not one of user.*, trusted.*, security.capability, system.posix_acl_*",
		Quote(name), k)
}

// refusal is an error that is the archive's own fault.
type refusal struct{ error }

func (r refusal) Unwrap() []error { return []error{ErrRefused, r.error} }

func refused(format string, args ...any) error { return refusal{fmt.Errorf(format, args...)} }

// refuse says which entry breaks which rule.
func refuse(path, format string, args ...any) error {
	return refused("entry %s: %w", Quote(path), fmt.Errorf(format, args...))
}
