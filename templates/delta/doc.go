// Package delta is what travels when a directory is pushed to a server that has
// parts of it already.
//
// First the client asks with a Query: the identity of its tree and a short mark
// for each of its chunks. The Answer says whether a version of the template holds
// just this tree, and which chunks it may have. Then the client sends a Body: the
// tree without contents (tree.Encode, compressed), a bit for each chunk that says
// whether it follows, and those that do, one behind the other. The server keeps
// nothing between the two: marks can be wrong, so a chunk that turns out to be
// missing there is asked for again, and a chunk counts only when it has the digest
// that the tree says.
//
// What is read here comes from a client and is hostile: Receive bounds the tree
// before it takes memory, and believes no length and no digest.
package delta
