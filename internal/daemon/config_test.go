package daemon

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func file(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "holdfastd.toml")
	must(t, os.WriteFile(name, []byte(text), 0o600))
	return name
}

func environment(pairs map[string]string) func(string) (string, bool) {
	return func(key string) (string, bool) {
		v, ok := pairs[key]
		return v, ok
	}
}

func TestDefaultsAreValid(t *testing.T) {
	c, err := Load(Sources{})
	must(t, err)
	if c.Socket != "/var/lib/holdfast/holdfastd.sock" || c.PoolDir != c.StateDir {
		t.Errorf("derived settings are %q, %q", c.Socket, c.PoolDir)
	}
}

func TestFlagsBeatEnvironmentBeatsFile(t *testing.T) {
	f := file(t, `
state_dir = "/from/file"
pool_size = "20GiB"
rate_limit = 5
overprovision = 1.5
drain_timeout = "5s"
regions = ["us-pdx-1", "eu-lon-1"]
tenants_attach = true
`)
	c, err := Load(Sources{
		File:   f,
		Getenv: environment(map[string]string{"HOLDFAST_STATE_DIR": "/from/env", "HOLDFAST_DRAIN_TIMEOUT": "6s", "HOLDFAST_MAX_SIZE": "1TiB"}),
		Flags:  map[string]string{"drain_timeout": "7s"},
	})
	must(t, err)
	for what, ok := range map[string]bool{
		"file":                c.PoolSize == 20<<30 && c.RateLimit == 5 && c.Overprovision == 1.5 && c.TenantsAttach,
		"list":                reflect.DeepEqual(c.Regions, []string{"us-pdx-1", "eu-lon-1"}),
		"environment":         c.StateDir == "/from/env" && c.MaxSize == 1<<40,
		"flag":                c.DrainLimit == 7*time.Second,
		"default region":      c.DefaultRegion == "us-pdx-1",
		"socket follows":      c.Socket == "/from/env/holdfastd.sock",
		"others keep default": c.MaxUploads == DefaultConfig().MaxUploads,
	} {
		if !ok {
			t.Errorf("%s: got %+v", what, c)
		}
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for name, c := range map[string]struct {
		s    Sources
		want string
	}{
		"exports to anybody":     {Sources{File: file(t, "export_address = \"10.0.0.1\"\n")}, "export_client_ca are needed"},
		"exports by a name":      {Sources{File: file(t, "export_address = \"host\"\n")}, "is not an IP address"},
		"exports nowhere":        {Sources{File: file(t, "export_address = \"::\"\n")}, "export_name is needed"},
		"ports of exports":       {Sources{File: file(t, "export_address = \"::1\"\nexport_ports = \"9-8\"\n")}, "FIRST-LAST"},
		"unknown key":            {Sources{File: file(t, "pool_sise = \"1GiB\"\n")}, `unknown key "pool_sise"`},
		"unknown table":          {Sources{File: file(t, "[pool]\nsize = 1\n")}, `"pool"`},
		"two unknown keys":       {Sources{File: file(t, "alpha = 1\nbeta = 2\n")}, `unknown key "beta"`},
		"not TOML":               {Sources{File: file(t, "state_dir = \n")}, "holdfastd.toml"},
		"no such file":           {Sources{File: "/nonexistent/x.toml"}, "/nonexistent/x.toml"},
		"size in file":           {Sources{File: file(t, "pool_size = \"20 bananas\"\n")}, "pool_size"},
		"size in environment":    {Sources{Getenv: environment(map[string]string{"HOLDFAST_POOL_SIZE": "1.5GiB"})}, "HOLDFAST_POOL_SIZE"},
		"duration in flag":       {Sources{Flags: map[string]string{"idle_timeout": "2"}}, "--idle-timeout"},
		"negative number":        {Sources{Flags: map[string]string{"max_uploads": "-1"}}, "--max-uploads"},
		"word":                   {Sources{Flags: map[string]string{"pool_mode": "zfs"}}, "auto, reflink, image, copy"},
		"dev on all addresses":   {Sources{Flags: map[string]string{"dev": "true", "listen": "0.0.0.0:80"}}, "loopback"},
		"dev on any host":        {Sources{Flags: map[string]string{"dev": "true", "listen": ":80"}}, "loopback"},
		"keys in clear":          {Sources{Flags: map[string]string{"listen": "10.0.0.1:80"}}, "tls_cert"},
		"no port":                {Sources{Flags: map[string]string{"listen": "127.0.0.1"}}, "HOST:PORT"},
		"port of no host":        {Sources{Flags: map[string]string{"listen": "127.0.0.1:65536"}}, "0 to 65535"},
		"negative port":          {Sources{Flags: map[string]string{"listen": "127.0.0.1:-1"}}, "0 to 65535"},
		"certificate alone":      {Sources{Flags: map[string]string{"tls_cert": "/x"}}, "both or neither"},
		"no place to listen":     {Sources{Flags: map[string]string{"listen": "none", "socket": "none"}}, "one of them"},
		"broken promise":         {Sources{Flags: map[string]string{"overprovision": "0.5"}}, "overprovision"},
		"not a number":           {Sources{Flags: map[string]string{"overprovision": "NaN"}}, "overprovision"},
		"prefix of everything":   {Sources{Flags: map[string]string{"host_prefixes": "/"}}, "below /"},
		"prefix that climbs":     {Sources{Flags: map[string]string{"host_prefixes": "/srv/../etc"}}, "clean"},
		"default region unknown": {Sources{Flags: map[string]string{"regions": "a,b", "default_region": "c"}}, `"c"`},
		"socket name too long":   {Sources{Flags: map[string]string{"state_dir": "/" + strings.Repeat("x", 120)}}, "socket"},
		"store without a slash":  {Sources{Flags: map[string]string{"remote_templates": "https://store.example/holdfast"}}, "remote_templates: \"https://store.example/holdfast\": it must end with a slash"},
		"store without a path":   {Sources{Flags: map[string]string{"remote_templates": "https://store.example"}}, "it must end with a slash"},
		"public URL":             {Sources{Flags: map[string]string{"public_url": "holdfast.example"}}, "public_url"},
		"pool of no kind":        {Sources{Flags: map[string]string{"pool": "fast=zfs:tank"}}, "lvm:GROUP/THINPOOL"},
		"pool without a name":    {Sources{Flags: map[string]string{"pool": "sparse:/srv/pool"}}, "name"},
		"pool twice":             {Sources{Flags: map[string]string{"pool": "lvm:vg/a,a=sparse:/srv/a"}}, "named before"},
		"default pool again":     {Sources{Flags: map[string]string{"pool": "default=lvm:vg/a"}}, "default"},
		"policy of no pool":      {Sources{Flags: map[string]string{"pool": "lvm:vg/a", "pool_policy": "b"}}, "neither"},
		"thin pool's threshold":  {Sources{Flags: map[string]string{"lvm_extend_at": "10"}}, "50 to 99"},
		"pool too small":         {Sources{Flags: map[string]string{"pool_size": "1MiB"}}, "pool_size"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(c.s)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
}

// TestSandboxTable: the settings of sandboxes may stand in a table of their own.
func TestSandboxTable(t *testing.T) {
	c, err := Load(Sources{File: file(t, "listen = \"127.0.0.1:1\"\n[sandbox]\nenabled = true\nmemory = \"1GiB\"\nimages = [\"a/b=/srv/b\", \"c:1=/srv/c\"]\n")})
	must(t, err)
	if !c.SandboxEnabled || c.SandboxMemory != 1<<30 || !reflect.DeepEqual(c.SandboxImages, []string{"a/b=/srv/b", "c:1=/srv/c"}) {
		t.Errorf("%+v", c)
	}
	if _, err := Load(Sources{File: file(t, "[sandbox]\nenable = true\n")}); err == nil || !strings.Contains(err.Error(), "sandbox_enable") {
		t.Errorf("an unknown key in the table: %v", err)
	}
	for _, bad := range []string{"max = 0", "users = 1", "users = 2147352576", "memory = \"1MiB\"", "images = [\"x\"]", "images = [\"x=y\"]", "run_dir = \"run\""} {
		if _, err := Load(Sources{File: file(t, "[sandbox]\n"+bad+"\n")}); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}

func TestAllMistakesAtOnce(t *testing.T) {
	_, err := Load(Sources{Flags: map[string]string{"pool_size": "x", "overprovision": "0"}})
	if err == nil || !strings.Contains(err.Error(), "pool-size") || !strings.Contains(err.Error(), "overprovision") {
		t.Errorf("error is %v", err)
	}
}

func TestWrittenConfigurationIsReadBack(t *testing.T) {
	c, err := Load(Sources{Flags: map[string]string{
		"dev": "true", "state_dir": "/tmp/x", "pool_size": "3GiB", "regions": "a,b", "rate_limit": "1e6", "host_prefixes": "/srv/a,/srv/b",
	}})
	must(t, err)
	var b bytes.Buffer
	must(t, c.Write(&b))
	back, err := Load(Sources{File: file(t, b.String())})
	must(t, err)
	// An empty list is written as [], which is not nil.
	for _, list := range []*[]string{&c.Pools, &c.RuncRoots, &c.VMSockets, &c.SandboxImages, &c.Registries, &c.RegistryHosts, &c.RemoteTemplates} {
		if *list == nil {
			*list = []string{}
		}
	}
	if !reflect.DeepEqual(c, back) {
		t.Errorf("read back:\n%+v\nwritten:\n%+v", back, c)
	}
}

func TestDevHasAPlaceToAttach(t *testing.T) {
	c, err := Load(Sources{Flags: map[string]string{"dev": "true", "state_dir": "/tmp/x"}})
	must(t, err)
	if !reflect.DeepEqual(c.HostPrefixes, []string{"/tmp/x/attach"}) || !c.TenantsAttach {
		t.Errorf("got %v, %v", c.HostPrefixes, c.TenantsAttach)
	}
}

// TestSampleIsTheDefaults: the file that is shipped says what holds without it.
func TestSampleIsTheDefaults(t *testing.T) {
	sample, err := Load(Sources{File: "../../deploy/holdfastd.toml"})
	must(t, err)
	want, err := Load(Sources{})
	must(t, err)
	var a, b bytes.Buffer
	must(t, sample.Write(&a))
	must(t, want.Write(&b))
	if a.String() != b.String() {
		t.Errorf("the sample says:\n%s\nthe defaults are:\n%s", a.String(), b.String())
	}
	text, err := os.ReadFile("../../deploy/holdfastd.toml")
	must(t, err)
	Names(func(name, _, _, _ string) {
		if name != "dev" && !strings.Contains(string(text), "\n"+name+" = ") && !strings.Contains(string(text), "\n# "+name+" = ") {
			t.Errorf("the sample does not show %s", name)
		}
	})
}
