// Command init is the first process of a guest (its /init): it mounts the root
// filesystem and runs the agent in it.
package main
