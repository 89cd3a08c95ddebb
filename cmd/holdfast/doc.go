// Command holdfast drives a Holdfast daemon: one subcommand per call of its API.
package main
