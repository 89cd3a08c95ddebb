package daemon

import (
	"fmt"
	"io"
)

// devWorkspace is the workspace that --dev makes.
const devWorkspace = "main"

// dev tells the developer how to reach the API.
func (n *node) dev(out io.Writer, url string) error {
	_, err := fmt.Fprintf(out, "API:       %s\nSocket:    %s\n", url, n.c.Socket)
	return err
}
