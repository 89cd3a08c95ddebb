// Package treetest plants file trees that are hard to keep, and compares trees
// inode by inode: what a template was made of with what a volume of it shows.
package treetest
