package cage

import (
	"os"
	"strings"

	"holdfast/internal/run"
)

// Missing says, without starting anything, what this host lacks for cages and
// what to do about each.
func Missing(command string) (reasons []string) {
	if command == "" {
		command = "runc"
	}
	if _, err := run.Look(command); err != nil {
		reasons = append(reasons, "runc is not installed: install the package runc")
	}
	if _, err := os.Stat("/proc/self/ns/user"); err != nil {
		reasons = append(reasons, "the kernel has no user namespaces: use one with CONFIG_USER_NS")
	} else if text, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); err == nil && strings.TrimSpace(string(text)) == "0" {
		reasons = append(reasons, "user namespaces are forbidden here: set the sysctl user.max_user_namespaces to 64 or more")
	}
	return reasons
}
