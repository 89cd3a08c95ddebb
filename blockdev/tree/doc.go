// Package tree is a file tree as data: what a template revision holds, without a
// filesystem around it. An archive is read into a Tree and the contents of its
// files into a store (a file in staging); a Tree is written into a filesystem
// image by package ext4fill; and the Tree of an image, whose runs then lie in the
// image itself, is the revision's manifest: what a diff compares, what a push
// asks for, what the next revision shares blocks with.
//
// A Tree is canonical: the same set of files with the same attributes gives the
// same Tree, in whatever order an archive had them. Everything that is made from
// a Tree depends on nothing else, so that equal trees make equal images.
package tree
