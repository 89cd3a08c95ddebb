// Package oci makes a file tree of a container image: it reads an image layout,
// the output of `docker save`, or an image of a registry, applies the layers in
// order and gives one plain tar, and the image's configuration. Templates are
// imported with it, and sandboxes get their root filesystem by it.
//
// Everything in an image is hostile. Every blob is held against its digest and
// size, every unpacked layer against the configuration's diff IDs, before the
// first byte of the tree is given out; the URLs that descriptors may carry are
// never asked. Layers are applied to a tree in memory which holds names and no
// contents, so nothing on the host is touched: the tar is made in a second pass,
// of the entries that were left.
//
// Layers are applied as containerd does (core/diff, archive.applyNaive; the rules
// are in image-spec, layer.md): whiteouts and opaque directories hide what lower
// layers put there, a directory over a directory keeps its contents, anything
// else replaces what was there, a hard link may lead into a lower layer, and a
// symbolic link in the middle of a path is followed inside the image's root,
// never out of it. A leading "/" means that root; ".." in a name is refused.
//
// Registries are fetched from by the server, on a tenant's word: only those that
// an operator listed, over TLS unless listed with http://, and no request goes
// anywhere else, by redirect or for a token, unless that host is listed as well.
package oci
