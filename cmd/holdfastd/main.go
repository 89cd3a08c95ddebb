package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"holdfast/blockdev/cage"
	"holdfast/internal/daemon"
)

// version is set by the linker.
var version = "unknown"

func main() {
	if len(os.Args) == 2 && os.Args[1] == daemon.InsideCage {
		os.Exit(cage.Inside())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// From the first signal on the default handling is back: a second one ends
	// the process at once.
	context.AfterFunc(ctx, stop)
	err := command().ExecuteContext(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "holdfastd: "+err.Error())
	}
	os.Exit(daemon.ExitCode(err))
}
