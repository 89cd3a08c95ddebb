package api

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"time"
)

// Exec asks for a process in a sandbox.
type Exec struct {
	Command string
	Name    string // empty: one is made
	Dir     string // empty: the image's
	Env     map[string]string
	Timeout time.Duration // after which it is killed; 0: never
	Wait    bool
	Stdin   bool
	Actor   string
}

// Process is a process in a sandbox, on the wire.
type Process struct {
	PID         string `json:"pid"`
	Name        string `json:"name"`
	Command     string `json:"command"`
	Status      string `json:"status"` // running, completed, failed, stopped, killed
	ExitCode    int    `json:"exitCode"`
	Logs        string `json:"logs"` // stdout and stderr as they came
	Stdout      string `json:"stdout"`
	Stderr      string `json:"stderr"`
	Truncated   bool   `json:"truncated,omitempty"` // there was more than is kept: the beginning is kept
	StartedAt   string `json:"startedAt"`
	CompletedAt string `json:"completedAt"`
	WorkingDir  string `json:"workingDir"`
}

// ProcessRequest is the body of POST process.
type ProcessRequest struct {
	Command           *string           `json:"command"`
	Name              *string           `json:"name"`
	WorkingDir        *string           `json:"workingDir"`
	Env               map[string]string `json:"env"`
	Timeout           *float64          `json:"timeout"` // seconds
	WaitForCompletion *bool             `json:"waitForCompletion"`
	Stdin             *bool             `json:"stdin"`
}

// ProcessLogs is what a process has written.
type ProcessLogs struct {
	Logs   string `json:"logs"`
	Stdout string `json:"stdout"`
	Stderr string `json:"stderr"`
}

// Done is the answer where there is nothing to show.
type Done struct {
	Message string `json:"message"`
	Path    string `json:"path,omitempty"`
}

// execWait bounds how long an answer is waited for: after that it says "running".
const execWait = 10 * time.Minute

func createProcess(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	c.resource = name
	var b ProcessRequest
	if err := c.decodeSlowly(&b, c.s.o.Limits.Body); err != nil {
		return err
	}
	e := Exec{
		Command: value(b.Command), Name: value(b.Name), Dir: value(b.WorkingDir), Env: b.Env,
		Wait: b.WaitForCompletion != nil && *b.WaitForCompletion, Stdin: b.Stdin != nil && *b.Stdin, Actor: c.principal.actor(),
	}
	if e.Command == "" {
		return invalid("command", "is required")
	}
	if b.Timeout != nil {
		if *b.Timeout < 0 || *b.Timeout > math.MaxInt32 {
			return invalid("timeout", "is in seconds, from 0 (none) to %d", math.MaxInt32)
		}
		e.Timeout = time.Duration(*b.Timeout * float64(time.Second))
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), execWait)
	defer cancel()
	p, err := r.Exec(ctx, c.workspace, name, e)
	if err != nil {
		return err
	}
	c.extendWrite()
	return c.json(p)
}

func listProcesses(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	all, err := r.Processes(c.workspace, name)
	if err != nil {
		return err
	}
	return c.json(all)
}

func (c *call) pathProcess() (Process, error) {
	r, name, err := c.pathSandbox()
	if err != nil {
		return Process{}, err
	}
	return r.Process(c.workspace, name, c.r.PathValue("process"))
}

func getProcess(c *call) error {
	p, err := c.pathProcess()
	if err != nil {
		return err
	}
	return c.json(p)
}

func getProcessLogs(c *call) error {
	p, err := c.pathProcess()
	if err != nil {
		return err
	}
	return c.json(ProcessLogs{Logs: p.Logs, Stdout: p.Stdout, Stderr: p.Stderr})
}

// followProcess sends lines "stdout:TEXT" and "stderr:TEXT" as they come.
func followProcess(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	if _, err := c.pathProcess(); err != nil {
		return err
	}
	c.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	c.w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(c.w)
	_ = flush.Flush()
	err = r.FollowProcess(c.r.Context(), c.workspace, name, c.r.PathValue("process"), func(stream, text string) error {
		c.extendWrite()
		if _, err := io.WriteString(c.w, stream+":"+text+"\n"); err != nil {
			return err
		}
		return flush.Flush()
	})
	if c.r.Context().Err() != nil {
		return nil // the client has enough
	}
	return err
}

func stopProcess(c *call) error { return c.endProcess(false) }
func killProcess(c *call) error { return c.endProcess(true) }

func (c *call) endProcess(kill bool) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	c.resource = name
	p, err := r.EndProcess(c.r.Context(), c.workspace, name, c.r.PathValue("process"), kill)
	if err != nil {
		return err
	}
	return c.json(p)
}

func writeStdin(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	c.resource = name
	if err := r.WriteStdin(c.workspace, name, c.r.PathValue("process"), c.patientBody()); err != nil {
		return err
	}
	c.extendWrite()
	return c.json(Done{Message: "written"})
}

func closeStdin(c *call) error {
	r, name, err := c.pathSandbox()
	if err != nil {
		return err
	}
	c.resource = name
	if err := r.CloseStdin(c.workspace, name, c.r.PathValue("process")); err != nil {
		return err
	}
	return c.json(Done{Message: "closed"})
}

// largestContent bounds a JSON body with a file in it; larger ones come in parts.
const largestContent = 32 << 20

// decodeSlowly is decode for a route without a deadline for the whole: each read
// has one. Who takes long bodies holds an uploadPlace.
func (c *call) decodeSlowly(v any, limit int64) error {
	b, err := io.ReadAll(http.MaxBytesReader(c.w, io.NopCloser(c.patientBody()), limit))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return refuse(ErrBodyTooLarge, "at most %d bytes are taken", limit)
	case err != nil:
		return invalid("body", "broke off before its end")
	}
	if len(b) == 0 || b[0] != '{' {
		return invalid("body", "must be a JSON object")
	}
	return unmarshal(b, v)
}
