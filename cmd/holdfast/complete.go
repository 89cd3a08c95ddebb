package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"holdfast/api/client"
)

// completionTime bounds what a shell waits for names.
const completionTime = 2 * time.Second

type completion = func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective)

// completeWith asks the server; when it does not answer there are no proposals.
func (a *app) completeWith(cmd *cobra.Command, ask func(context.Context, *client.Client) ([]string, error)) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx := cmd.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completionTime)
	defer cancel()
	cl, err := a.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	names, err := ask(ctx, cl)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

var _ completion = (&app{}).completeVolumes

func (a *app) completeVolumes(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 && cmd.Name() != "delete" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeWith(cmd, func(ctx context.Context, cl *client.Client) (names []string, err error) {
		page, err := cl.ListVolumes(ctx, client.VolumeQuery{Limit: 200, Sort: "name:asc", Search: prefix})
		for _, v := range page.Data {
			names = append(names, v.Metadata.Name)
		}
		return names, err
	})
}

func (a *app) completeTemplates(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 && cmd.Name() == "get" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeWith(cmd, func(ctx context.Context, cl *client.Client) (names []string, err error) {
		if cmd.Name() == "delete-version" && len(args) == 1 {
			t, err := cl.Template(ctx, args[0])
			for _, v := range t.Versions {
				names = append(names, v.Name)
			}
			return names, err
		}
		all, err := cl.Templates(ctx)
		for _, t := range all {
			names = append(names, t.Metadata.Name)
		}
		return names, err
	})
}

func (a *app) completePush(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeTemplates(cmd, args, prefix)
	}
	return nil, cobra.ShellCompDirectiveDefault // a directory or a file
}

func (a *app) completeAttachments(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeVolumes(cmd, args, prefix)
	}
	if len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeWith(cmd, func(ctx context.Context, cl *client.Client) (ids []string, err error) {
		all, err := cl.Attachments(ctx, args[0])
		for _, at := range all {
			ids = append(ids, at.ID)
		}
		return ids, err
	})
}
