// Package templates turns uploaded archives into immutable, versioned images
// (revisions), and keeps the cache of sized images ("sources") that volumes are
// cloned from: formatted blanks, and revisions grown to a size. Archives are
// hostile input; images, once READY, never change.
package templates
