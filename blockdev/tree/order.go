package tree

import (
	"slices"
	"strings"
)

// Compare orders paths as a Tree has them: as bytes, with '/' before everything
// else, and the root (".") first.
func Compare(a, b string) int {
	switch {
	case a == b:
		return 0
	case a == ".":
		return -1
	case b == ".":
		return 1
	}
	n := min(len(a), len(b))
	for i := range n {
		switch x, y := a[i], b[i]; {
		case x == y:
		case x == '/':
			return -1
		case y == '/':
			return 1
		case x < y:
			return -1
		default:
			return 1
		}
	}
	return len(a) - len(b)
}

// Find gives the node whose Path is path, or nil. It does not look at Links.
func (t Tree) Find(path string) *Node {
	i, ok := slices.BinarySearchFunc(t.Nodes, path, func(n Node, p string) int { return Compare(n.Path, p) })
	if !ok {
		return nil
	}
	return &t.Nodes[i]
}

// Within reports whether path is dir or below it.
func Within(path, dir string) bool {
	return dir == "." || strings.HasPrefix(path, dir) && (len(path) == len(dir) || path[len(dir)] == '/')
}

// Split gives the directory of a path, "." for the root, and the name in it.
func Split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return ".", path
	}
	return path[:i], path[i+1:]
}

// Data is how many bytes of a file are not holes.
func (n *Node) Data() (bytes int64) {
	for _, r := range n.Runs {
		bytes += r.Length
	}
	return bytes
}
