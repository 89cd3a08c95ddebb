package runctest

import (
	"strings"
	"testing"
)

func TestContainer(t *testing.T) {
	for name, o := range map[string]Options{
		"plain": {}, "read-only": {ReadOnlyRoot: true}, "user namespace": {UserNamespace: true}, "only created": {OnlyCreate: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := Start(t, o)
			if o.OnlyCreate {
				c.Start()
			}
			if got := c.Shell("id -u; echo hi"); got != "0\nhi\n" {
				t.Errorf("output %q", got)
			}
			if out, err := c.Exec("sh", "-c", "echo no; exit 3"); err == nil || out != "no\n" {
				t.Errorf("a failing command: %q, %v", out, err)
			}
			_, err := c.Exec("touch", "/file")
			if refused := err != nil; refused != o.ReadOnlyRoot {
				t.Errorf("write to the root filesystem: %v", err)
			}
			pid := c.Background("sleep 1000")
			if got := c.MustExec("ps"); !strings.Contains(got, "sleep 1000") {
				t.Errorf("background process is not there: %s", got)
			}
			c.Kill()
			if !ended(pid) {
				t.Errorf("process %d lives on", pid)
			}
			c.Delete()
			c.Delete()
		})
	}
}
