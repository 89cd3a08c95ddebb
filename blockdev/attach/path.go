package attach

import (
	"fmt"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"holdfast/blockdev"
)

// longestPath is the kernel's bound on a path (PATH_MAX, without its final NUL), in
// bytes.
const longestPath = 4095

// CheckPath checks a caller's path by its text alone: absolute, clean, not the
// root. blockdev.ErrInvalid with the rule. Where it leads is found out when it is
// walked.
func CheckPath(p string) error {
	rule := ""
	switch {
	case !path.IsAbs(p):
		rule = "the path must be absolute"
	case p != path.Clean(p):
		rule = `the path must be clean: no ".", "..", double or final slash`
	case p == "/":
		rule = "the path must not be /"
	case len(p) > longestPath:
		rule = fmt.Sprintf("the path is longer than %d bytes", longestPath)
	case !utf8.ValidString(p), strings.ContainsFunc(p, unicode.IsControl):
		rule = "the path must be UTF-8 without control characters"
	default:
		return nil
	}
	return fmt.Errorf("%w: %s", blockdev.ErrInvalid, rule)
}
