package main

import (
	"fmt"
	"os"

	"holdfast/blockdev/serve/worker"
)

// birthFD is the socket that says what to serve.
const birthFD = 3

func main() {
	if err := worker.Run(os.NewFile(birthFD, "birth")); err != nil {
		fmt.Fprintln(os.Stderr, "holdfast-blockd: "+err.Error())
		os.Exit(1)
	}
}
