package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
)

// moveLook is how often a move is looked at while it is waited for.
const moveLook = 250 * time.Millisecond

func (a *app) volumeMove() *cobra.Command {
	var pool string
	var noWait bool
	c := &cobra.Command{
		Use: "move NAME", Short: "Move a detached volume to another pool", Args: cobra.ExactArgs(1),
		Long: "Move a detached volume to another pool of its host, and wait until it is there. The volume cannot be attached or grown meanwhile.\n" +
			"The move goes on when this command or the server ends. Moving it to the pool where it still is takes the move back.",
		Example:           "  holdfast volume move data --pool fast\n  holdfast volume move data --pool default",
		ValidArgsFunction: a.completeVolumes,
		RunE: func(cmd *cobra.Command, args []string) error {
			cl, err := a.client()
			if err != nil {
				return err
			}
			v, err := cl.MoveVolume(cmd.Context(), args[0], pool)
			if err == nil && !noWait {
				v, err = a.awaitMove(cmd.Context(), cl, v)
			}
			if err != nil {
				return err
			}
			return a.showVolume(v)
		},
	}
	c.Flags().StringVar(&pool, "pool", "", "the pool to move to")
	c.Flags().BoolVar(&noWait, "no-wait", false, "return when the move has begun")
	_ = c.MarkFlagRequired("pool")
	return c
}

// awaitMove waits for the end of a move, and says why one does not get on.
func (a *app) awaitMove(ctx context.Context, cl *client.Client, v client.Volume) (client.Volume, error) {
	said := ""
	for v.State.Move != nil {
		if m := v.State.Move; m.Failure != "" && m.Failure != said {
			said = m.Failure
			fmt.Fprintf(a.errOut, "the move waits: %s\n", said)
		}
		select {
		case <-ctx.Done():
			return v, ctx.Err()
		case <-time.After(moveLook):
		}
		var err error
		if v, err = cl.Volume(ctx, v.Metadata.Name); err != nil {
			return v, err
		}
	}
	return v, nil
}
