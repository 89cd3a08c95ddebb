package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"holdfast/api"
)

// devWorkspace is the workspace that --dev makes.
const devWorkspace = "main"

// printDev says how the API is reached, in a form that a shell can read.
func (n *node) printDev(out io.Writer, url, key string) error {
	_, err := fmt.Fprintf(out, "BL_API_URL=%s\nBL_WORKSPACE=%s\nBL_API_KEY=%s\n", url, devWorkspace, key)
	return err
}

// devKey makes sure of a workspace and an admin key for a developer. The key of
// an earlier start is kept while it is good.
func (n *node) devKey(ctx context.Context) (string, error) {
	if _, err := n.auth.Workspace(devWorkspace); errors.Is(err, api.ErrMissing) {
		if _, err := n.auth.PutWorkspace(ctx, devWorkspace, nil, "dev"); err != nil {
			return "", err
		}
	} else if err != nil {
		return "", err
	}
	b, err := os.ReadFile(n.at.devKey())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if key := strings.TrimSpace(string(b)); key != "" {
		if _, err := n.auth.Identify(key); err == nil {
			return key, nil
		}
	}
	// It may act on the node as well, so that a developer needs no other key.
	_, key, err := n.auth.CreateKey(ctx, api.NewKey{Name: "dev", Workspace: devWorkspace, Role: api.Admin, ControlPlane: true, Actor: "dev"})
	if err != nil {
		return "", err
	}
	return key, writeFile(n.at.devKey(), []byte(key+"\n"))
}
