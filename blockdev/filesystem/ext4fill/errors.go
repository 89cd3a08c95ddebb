package ext4fill

import (
	"errors"
	"fmt"
)

var (
	// ErrFull: the image has too few free blocks or inodes for the tree. What was
	// written until then is of no use.
	ErrFull = errors.New("image is too small for the tree")
	// ErrTooLarge: a node is beyond what ext4 can hold: its size, extended
	// attributes, symbolic link or number of names. The message names it.
	ErrTooLarge = errors.New("more than ext4 can hold")
	// ErrInvalid: the tree is not canonical, or a node has what no filesystem
	// shows, such as a malformed ACL. The message names the node.
	ErrInvalid = errors.New("invalid file tree")
	// ErrImage: the image is not an empty ext4 of a kind that can be filled.
	ErrImage = errors.New("not an empty ext4 that can be filled")
)

// about names the node that an error is about.
func about(path string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%q: %w", path, err)
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

func tooLarge(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrTooLarge, fmt.Sprintf(format, args...))
}

func notOurs(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrImage, fmt.Sprintf(format, args...))
}
