// Package extent deals with the data and the holes of sparse files: where the
// data is, copying only that, comparing, and giving back the space of zeroes. Block
// devices can be copied and compared as well; they do not tell their holes.
package extent
