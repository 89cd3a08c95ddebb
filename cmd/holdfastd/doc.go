// Command holdfastd is the node daemon: it reads its configuration, opens its
// stores, wires the packages, reconciles, listens, and shuts down.
package main
