// Package demo shows the whole job once, on real input, with a short narration:
// a template from a real tree, a volume from it in a real container, the
// container destroyed, the data in a second one, growth while mounted, deletion;
// or the same with virtual machines. It uses the public API, runc and QEMU, and
// cleans up after itself.
package demo
