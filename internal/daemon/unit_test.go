package daemon

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// namespaceDirectives each make systemd give the service a mount namespace of
// its own (systemd.exec(5), and exec_needs_mount_namespace in its source), in
// which pool and volume mounts would be hidden and would end with the daemon.
var namespaceDirectives = regexp.MustCompile(`^(Private(Tmp|Devices|Mounts|Users|Network|IPC|PIDs|BPF)|Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc|Hostname|Clock)|ProcSubset|MountFlags|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec|Bind|BindReadOnly)Paths|ReadWriteDirectories|ReadOnlyDirectories|InaccessibleDirectories|TemporaryFileSystem|RootDirectory|RootDirectoryStartOnly|RootImage|RootEphemeral|RootHash|MountImages|Extension(Images|Directories)|MountAPIVFS|DynamicUser|LogNamespace|JoinsNamespaceOf|NetworkNamespacePath|IPCNamespacePath|LoadCredential|LoadCredentialEncrypted|SetCredential|ImportCredential)=(.*)$`)

// unit reads the directives of the unit file.
func unit(t *testing.T) map[string]string {
	t.Helper()
	b, err := os.ReadFile("../../deploy/holdfastd.service")
	must(t, err)
	directives := map[string]string{}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "[") {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			t.Fatalf("not a directive: %q", line)
		}
		if namespaceDirectives.MatchString(line) {
			t.Errorf("%s: this gives the daemon a mount namespace of its own", line)
		}
		directives[key] = value
	}
	return directives
}

func TestUnitMakesNoMountNamespace(t *testing.T) {
	if len(unit(t)) < 10 {
		t.Error("the unit file was not read")
	}
	for _, line := range []string{"PrivateTmp=yes", "ProtectSystem=strict", "ReadWritePaths=/x", "ProtectHome=true"} {
		if !namespaceDirectives.MatchString(line) {
			t.Errorf("%s is not noticed", line)
		}
	}
}

func TestUnitLeavesSandboxesAlone(t *testing.T) {
	for key, want := range map[string]string{
		"Type": "notify", "KillMode": "process", "Delegate": "yes", "Restart": "on-failure", "RestartPreventExitStatus": "3 78",
	} {
		if got := unit(t)[key]; got != want {
			t.Errorf("%s=%s, want %s", key, got, want)
		}
	}
	for _, inherited := range []string{"NoNewPrivileges", "SystemCallFilter", "CapabilityBoundingSet", "RestrictAddressFamilies", "MemoryDenyWriteExecute"} {
		if _, there := unit(t)[inherited]; there {
			t.Errorf("%s is inherited by every sandbox that the daemon starts", inherited)
		}
	}
}
