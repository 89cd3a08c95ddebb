package daemon

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"holdfast/blockdev/attach/firecracker"
	"holdfast/blockdev/attach/qemu"
	"holdfast/engine"
	"holdfast/templates/remote"
)

// Config is what an operator can set. Sizes are bytes. Every setting has one
// name (settings, below): as a flag with dashes, in the environment in capitals
// behind HOLDFAST_, in the TOML file as it is.
type Config struct {
	Version string // of this build; no setting

	StateDir  string
	Listen    string
	Socket    string // "": StateDir/holdfastd.sock; "none": no socket
	TLSCert   string
	TLSKey    string
	PublicURL string
	Dev       bool

	LogFormat string
	LogLevel  string

	PoolMode      string
	PoolDir       string   // "": StateDir
	Pools         []string // further ones; see poolSpec
	PoolPolicy    string
	LVMExtendAt   int // percent; 0: never
	LVMExtendBy   int
	PoolSize      int64 // 0: a quarter of the free space, at most 20 GiB
	Overprovision float64
	Reserve       int64 // 0: a fiftieth of the pool, at most 1 GiB

	Regions       []string
	DefaultRegion string
	MaxSize       int64
	HostPrefixes  []string
	RuncRoot      string
	RuncRoots     []string
	VMSockets     []string
	FirecrackerIO string // "Sync", "Async"
	QemuAIO       string // "auto", "io_uring", "native", "threads"
	TenantsAttach bool   // with --dev always

	ExportAddress string // where exports over TLS are reached; "": nowhere
	ExportName    string // "": the address
	ExportPorts   string // FIRST-LAST
	ExportCert    string
	ExportKey     string
	ExportCA      string

	Worker string // program; "": beside this one; "none"

	Cage       string // "required", "off"
	CageWarm   int
	CageMemory int64

	RateLimit     float64 // requests per second and key; 0: no limit
	RateBurst     int
	MaxUploads    int
	MaxArchive    int64
	MaxEntries    int
	HeaderLimit   time.Duration
	RequestLimit  time.Duration // of a request, transfers apart
	TransferLimit time.Duration // of a pause inside an upload or a download
	IdleLimit     time.Duration
	DrainLimit    time.Duration
	StepLimit     time.Duration // of a step of an attachment

	KeepVersions        int           // READY ones of a template, pinned ones not counted
	KeepAge             time.Duration // of READY versions; 0: no bound
	ScrubInterval       time.Duration // 0: never
	ScrubRate           int64         // bytes a second; 0: no bound
	TrimInterval        time.Duration // 0: none
	FreezeLimit         time.Duration
	Registries          []string // that images may be fetched from; HOST[:PORT], or http://HOST[:PORT]
	RegistryHosts       []string // further ones that those may send us to, for blobs and tokens
	RegistryCredentials string   // docker config.json; "": none
	ImportLimit         time.Duration
	RemoteTemplates     []string // prefixes of URLs that template versions may stay at

	BackupInterval time.Duration // 0: none
	BackupKeep     int

	SandboxEnabled bool // with --dev always
	SandboxImages  []string
	SandboxMax     int
	SandboxMemory  int64 // of one
	SandboxPids    int
	SandboxLayer   int64
	SandboxUsers   int // the first of the host's user ids that sandboxes get; 0: none
	SandboxRunDir  string
}

// DefaultConfig is what holds when nothing is set.
func DefaultConfig() Config {
	return Config{
		StateDir: "/var/lib/holdfast", Listen: "127.0.0.1:7433",
		LogFormat: "text", LogLevel: "info",
		PoolMode: "auto", Overprovision: 1.0, PoolPolicy: engine.PolicyFirst, LVMExtendBy: 20,
		DefaultRegion: "local", MaxSize: 64 << 40,
		RuncRoot: "/run/runc", FirecrackerIO: firecracker.Sync, QemuAIO: string(qemu.Auto), ExportPorts: "10810-11809",
		Cage: cageRequired, CageWarm: 2, CageMemory: 1 << 30,
		RateLimit: 200, RateBurst: 400, MaxUploads: 4, MaxArchive: 64 << 30, MaxEntries: 2_000_000,
		HeaderLimit: 10 * time.Second, RequestLimit: time.Minute, TransferLimit: time.Minute,
		IdleLimit: 2 * time.Minute, DrainLimit: 30 * time.Second, StepLimit: 20 * time.Second,
		KeepVersions: 100, ScrubInterval: 7 * 24 * time.Hour, ScrubRate: 16 << 20,
		TrimInterval: 24 * time.Hour, FreezeLimit: time.Minute,
		ImportLimit:    15 * time.Minute,
		BackupInterval: time.Hour, BackupKeep: 24,
		SandboxMax: 100, SandboxMemory: 8 << 30, SandboxPids: 1024, SandboxLayer: 512 << 20, SandboxUsers: 0x70000000, SandboxRunDir: "/run/holdfast",
	}
}

// setting is one thing that an operator can set.
type setting struct {
	name  string // with underscores
	usage string
	value value
}

func (s setting) flag() string { return strings.ReplaceAll(s.name, "_", "-") }
func (s setting) env() string  { return "HOLDFAST_" + strings.ToUpper(s.name) }

// settings binds every name to its place in c, in the order of the help.
func (c *Config) settings() []setting {
	return []setting{
		{"state_dir", "directory of everything that the daemon keeps", textValue{&c.StateDir}},
		{"listen", "TCP address of the API; \"none\": only the socket", textValue{&c.Listen}},
		{"socket", "unix socket of the API, whose users are administrators (default: STATE_DIR/holdfastd.sock; \"none\": no socket)", textValue{&c.Socket}},
		{"tls_cert", "certificate file (PEM) for the TCP address", textValue{&c.TLSCert}},
		{"tls_key", "private key file (PEM) for the TCP address", textValue{&c.TLSKey}},
		{"public_url", "base that clients reach the API by, for upload URLs (default: made from each request)", textValue{&c.PublicURL}},
		{"dev", "for development: loopback only, with a workspace \"main\" and an admin key made at the first start", boolValue{&c.Dev}},
		{"log_format", "form of the log on stderr", choiceValue{&c.LogFormat, []string{"text", "json"}}},
		{"log_level", "least important level that is logged", choiceValue{&c.LogLevel, []string{"debug", "info", "warn", "error"}}},
		{"pool_mode", "how images are kept: in a directory that can reflink, in a file system image made there, or copied", choiceValue{&c.PoolMode, []string{"auto", "reflink", "image", "copy"}}},
		{"pool_dir", "directory of the pool (default: STATE_DIR)", textValue{&c.PoolDir}},
		{"pool_size", "size of the pool's image (default: a quarter of the free space, at most 20GiB)", sizeValue{&c.PoolSize}},
		{"pool", "further pools, as [NAME=]lvm:GROUP/THINPOOL or NAME=sparse:/DIRECTORY; the one in pool_dir is called \"default\"", listValue{&c.Pools}},
		{"pool_policy", "pool of a volume whose request names none: default, most-free, or a pool's name", textValue{&c.PoolPolicy}},
		{"lvm_extend_at", "percent in use at which a thin pool gets more space from its volume group; 0: never", intValue{&c.LVMExtendAt}},
		{"lvm_extend_by", "percent that it gets then, or all that the group has", intValue{&c.LVMExtendBy}},
		{"overprovision", "how many bytes are promised for each byte there is; above 1 promises can be broken", floatValue{&c.Overprovision}},
		{"reserve", "bytes kept free for deletes and metadata (default: a fiftieth of the pool, at most 1GiB)", sizeValue{&c.Reserve}},
		{"regions", "regions that volumes may name (default: any)", listValue{&c.Regions}},
		{"default_region", "region of volumes that name none", textValue{&c.DefaultRegion}},
		{"max_size", "largest volume", sizeValue{&c.MaxSize}},
		{"host_prefixes", "directories below which volumes may be attached on this host", listValue{&c.HostPrefixes}},
		{"runc_root", "runc's state directory for containers whose target names none", textValue{&c.RuncRoot}},
		{"runc_roots", "further state directories of runc that a target may name", listValue{&c.RuncRoots}},
		{"vm_sockets", "directories below which targets may name sockets of virtual machines: of monitors (QMP) of QEMU, of the APIs of Firecracker and Cloud Hypervisor", listValue{&c.VMSockets}},
		{"firecracker_io_engine", "how Firecracker does a volume's I/O: Sync, or Async (io_uring)", choiceValue{&c.FirecrackerIO, []string{firecracker.Sync, firecracker.Async}}},
		{"qemu_aio", "how QEMU does a volume's I/O: io_uring, native, threads, or auto: the first of them that it has", choiceValue{&c.QemuAIO, qemu.AIOs()}},
		{"tenants_attach", "let a workspace's own keys attach volumes: their targets are paths and containers of this host", boolValue{&c.TenantsAttach}},
		{"export_address", "address of this host where exports with transport tls are reached (default: nowhere)", textValue{&c.ExportAddress}},
		{"export_name", "name of this host in the addresses of exports, which the certificate is for (default: export_address)", textValue{&c.ExportName}},
		{"export_ports", "ports for exports, one each, as FIRST-LAST", textValue{&c.ExportPorts}},
		{"export_cert", "certificate file (PEM, with its chain) of exports; read again when replaced", textValue{&c.ExportCert}},
		{"export_key", "private key file (PEM) of exports: each worker that serves one gets it, so have one for nothing else", textValue{&c.ExportKey}},
		{"export_client_ca", "file (PEM) of the authorities whose certificates clients of exports must have", textValue{&c.ExportCA}},
		{"worker", "program that serves volumes over sockets, one process for each (default: holdfast-blockd beside holdfastd, if it is there; \"none\": no workers)", textValue{&c.Worker}},
		{"cage", "where filesystem tools read what tenants have written: in a cage (runc, user namespaces), or, off, as root on this host", choiceValue{&c.Cage, []string{cageRequired, cageOff}}},
		{"cage_warm", "cages that wait ready: a grow that finds none waits for one to be made", intValue{&c.CageWarm}},
		{"cage_memory", "most memory for the tools in one cage", sizeValue{&c.CageMemory}},
		{"rate_limit", "requests per second and key; 0: no limit", floatValue{&c.RateLimit}},
		{"rate_burst", "requests of a key at once before the limit holds", intValue{&c.RateBurst}},
		{"max_uploads", "template uploads at once", intValue{&c.MaxUploads}},
		{"max_archive", "largest template archive, unpacked as well", sizeValue{&c.MaxArchive}},
		{"max_entries", "most files, directories and links of a template archive", intValue{&c.MaxEntries}},
		{"header_timeout", "for reading a request's headers", durationValue{&c.HeaderLimit}},
		{"request_timeout", "for a request with its answer, uploads and downloads apart", durationValue{&c.RequestLimit}},
		{"transfer_timeout", "longest pause inside an upload or a download", durationValue{&c.TransferLimit}},
		{"idle_timeout", "after which an idle connection is closed", durationValue{&c.IdleLimit}},
		{"drain_timeout", "for requests under way when the daemon is told to stop", durationValue{&c.DrainLimit}},
		{"attach_step_timeout", "for one step of an attachment, after which it is said to hang and its volume waits for its end", durationValue{&c.StepLimit}},
		{"keep_versions", "READY versions of a template that are kept unless it says otherwise; pinned ones do not count", intValue{&c.KeepVersions}},
		{"keep_age", "after which a READY version goes unless its template says otherwise, the newest and pinned ones never; 0: no bound", durationValue{&c.KeepAge}},
		{"scrub_interval", "after which a template image is verified again; 0: never", durationValue{&c.ScrubInterval}},
		{"scrub_rate", "bytes a second that are read to verify template images; 0: no bound", sizeValue{&c.ScrubRate}},
		{"trim_interval", "in which each volume that was written to is trimmed once, at a moment of its own; 0: only on request", durationValue{&c.TrimInterval}},
		{"freeze_limit", "longest that a request may freeze a volume", durationValue{&c.FreezeLimit}},
		{"registries", "registries that container images may be fetched from, as HOST[:PORT], or http://HOST[:PORT] to ask in clear (default: none)", listValue{&c.Registries}},
		{"registry_hosts", "further hosts, in the same form, that a registry may send the server to for blobs and tokens", listValue{&c.RegistryHosts}},
		{"registry_credentials", "docker config.json with credentials for registries (default: none)", textValue{&c.RegistryCredentials}},
		{"remote_templates", "prefixes of URLs, https://HOST/PATH/ or http://HOST/PATH/, below which the bytes of registered template versions may stay; read docs/remote-templates.md (default: none)", listValue{&c.RemoteTemplates}},
		{"import_timeout", "for importing an image, fetching and building", durationValue{&c.ImportLimit}},
		{"backup_interval", "between backups of the metadata into STATE_DIR/backups; 0: none", durationValue{&c.BackupInterval}},
		{"backup_keep", "backups that are kept", intValue{&c.BackupKeep}},
		{"sandbox_enabled", "run sandboxes on this host (docs/sandboxes.md); in the file also: enabled in [sandbox], and so on", boolValue{&c.SandboxEnabled}},
		{"sandbox_images", "root filesystems of sandboxes: NAME=/DIRECTORY, NAME=oci:/PATH[#TAG] or NAME=HOST/IMAGE[:TAG] of a registry in registries; NAME as clients send it, with or without tag (default: a minimal one for every name)", listValue{&c.SandboxImages}},
		{"sandbox_max", "most sandboxes at once", intValue{&c.SandboxMax}},
		{"sandbox_memory", "most memory of one sandbox", sizeValue{&c.SandboxMemory}},
		{"sandbox_pids", "most processes and threads of one sandbox", intValue{&c.SandboxPids}},
		{"sandbox_layer", "most that one sandbox may change of its root filesystem; it is memory of the sandbox", sizeValue{&c.SandboxLayer}},
		{"sandbox_users", "first of the host's user and group ids that sandboxes get, 65536 each; 0: no user namespaces", intValue{&c.SandboxUsers}},
		{"sandbox_run_dir", "directory in memory for what running sandboxes need", textValue{&c.SandboxRunDir}},
	}
}

// Sources are the places that a configuration is read from; the first named
// wins: flags, environment, file, defaults.
type Sources struct {
	Flags  map[string]string           // by setting name; only those given
	Getenv func(string) (string, bool) // nil: no environment
	File   string                      // TOML; "": none
}

// Load reads, fills in what follows from other settings, and checks. All
// errors are reported at once.
func Load(s Sources) (Config, error) {
	c := DefaultConfig()
	file, err := readFile(s.File)
	errs := []error{err}
	for _, set := range c.settings() {
		if text, ok := file[set.name]; ok {
			errs = append(errs, wrap(s.File+": "+set.name, set.value.Parse(text)))
			delete(file, set.name)
		}
		if s.Getenv != nil {
			if text, ok := s.Getenv(set.env()); ok && text != "" {
				errs = append(errs, wrap(set.env(), set.value.Parse(text)))
			}
		}
		if text, ok := s.Flags[set.name]; ok {
			errs = append(errs, wrap("--"+set.flag(), set.value.Parse(text)))
		}
	}
	for _, name := range slices.Sorted(mapKeys(file)) {
		errs = append(errs, fmt.Errorf("%s: unknown key %q", s.File, name))
	}
	c.complete()
	errs = append(errs, c.check()...)
	return c, errors.Join(errs...)
}

func mapKeys(m map[string]string) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func wrap(where string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", where, err)
}

// tables are those of the file; a key in one is the setting with both names.
var tables = []string{"sandbox"}

// readFile gives the file's keys as the text that settings parse.
func readFile(name string) (map[string]string, error) {
	if name == "" {
		return nil, nil
	}
	var raw map[string]any
	if _, err := toml.DecodeFile(name, &raw); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	for _, name := range tables {
		table, ok := raw[name].(map[string]any)
		if !ok {
			continue
		}
		delete(raw, name)
		for key, v := range table {
			raw[name+"_"+key] = v
		}
	}
	texts := make(map[string]string, len(raw))
	for key, v := range raw {
		switch v := v.(type) {
		case string, bool, int64, float64:
			texts[key] = fmt.Sprint(v)
		case []any:
			words := make([]string, len(v))
			for i := range v {
				words[i] = fmt.Sprint(v[i])
			}
			texts[key] = strings.Join(words, ",")
		default:
			texts[key] = "" // a table or a date: no setting has that form
			return texts, fmt.Errorf("%s: unknown key or form: %q", name, key)
		}
	}
	return texts, nil
}

func (c *Config) complete() {
	if abs, err := filepath.Abs(c.StateDir); err == nil && c.StateDir != "" {
		c.StateDir = abs
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.StateDir, "holdfastd.sock")
	}
	if c.PoolDir == "" {
		c.PoolDir = c.StateDir
	}
	c.TenantsAttach = c.TenantsAttach || c.Dev
	c.SandboxEnabled = c.SandboxEnabled || c.Dev
	if c.Dev && len(c.HostPrefixes) == 0 {
		c.HostPrefixes = []string{filepath.Join(c.StateDir, "attach")}
	}
	if len(c.Regions) > 0 && c.DefaultRegion == DefaultConfig().DefaultRegion && !slices.Contains(c.Regions, c.DefaultRegion) {
		c.DefaultRegion = c.Regions[0]
	}
}

// unixPathMax is the longest name that bind(2) takes (sun_path, unix(7)).
const unixPathMax = 107

func (c *Config) check() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.StateDir == "" {
		bad("state_dir: must be set")
	}
	if !filepath.IsAbs(c.PoolDir) {
		bad("pool_dir: %q is not an absolute path", c.PoolDir)
	}
	if c.Socket != "none" && (!filepath.IsAbs(c.Socket) || len(c.Socket) > unixPathMax) {
		bad("socket: %q must be absolute and at most %d bytes long", c.Socket, unixPathMax)
	}
	if c.Listen == "none" && c.Socket == "none" {
		bad("listen and socket: one of them must be there")
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		bad("tls_cert and tls_key: both or neither")
	}
	if err := c.checkPools(); err != nil {
		bad("%w", err)
	}
	if c.LVMExtendAt != 0 && (c.LVMExtendAt < 50 || c.LVMExtendAt > 99) || c.LVMExtendBy < 0 || c.LVMExtendBy > 1000 {
		bad("lvm_extend_at is 0 or 50 to 99, lvm_extend_by 0 to 1000")
	}
	if c.Overprovision < 1 {
		bad("overprovision: %g is below 1", c.Overprovision)
	}
	if c.MaxSize < 1<<20 || c.MaxSize%(1<<20) != 0 {
		bad("max_size: must be whole MiB, at least 1MiB")
	}
	if c.KeepVersions < 1 || c.KeepVersions > 300 {
		bad("keep_versions: must be 1 to 300")
	}
	if c.ScrubInterval != 0 && c.ScrubInterval < minScrubInterval {
		bad("scrub_interval: must be at least %s, or 0", minScrubInterval)
	}
	if c.ScrubRate != 0 && c.ScrubRate < 1<<20 {
		bad("scrub_rate: must be at least 1MiB, or 0")
	}
	if c.PoolSize != 0 && c.PoolSize < 300<<20 {
		bad("pool_size: must be at least 300MiB")
	}
	if c.Worker != "" && c.Worker != workerNone && (!filepath.IsAbs(c.Worker) || filepath.Clean(c.Worker) != c.Worker) {
		bad("worker: %q must be an absolute, clean path, or %q", c.Worker, workerNone)
	}
	if c.CageMemory < 64<<20 {
		bad("cage_memory: must be at least 64MiB")
	}
	if c.CageWarm > 16 {
		bad("cage_warm: must be at most 16")
	}
	if len(c.Regions) > 0 && !slices.Contains(c.Regions, c.DefaultRegion) {
		bad("default_region: %q is not in regions", c.DefaultRegion)
	}
	for _, p := range slices.Concat(c.HostPrefixes, c.RuncRoots, c.VMSockets) {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			bad("host_prefixes, runc_roots, vm_sockets: %q must be an absolute, clean path below /", p)
		}
	}
	errs = append(errs, c.checkSandbox()...)
	if _, err := c.exportNetwork(); err != nil {
		errs = append(errs, err)
	}
	if _, err := remote.NewStores(c.RemoteTemplates); err != nil {
		bad("remote_templates: %w", err)
	}
	if u, err := url.Parse(c.PublicURL); c.PublicURL != "" && (err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https")) {
		bad("public_url: %q is not an http or https URL", c.PublicURL)
	}
	return append(errs, c.checkListen()...)
}

// usersEnd is where systemd's reserved ids begin; below it 65536 for each sandbox.
const usersEnd = 0x7ffe0000

func (c *Config) checkSandbox() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.SandboxMax < 1 {
		bad("sandbox_max: must be at least 1")
	}
	if c.SandboxMemory < 64<<20 {
		bad("sandbox_memory: must be at least 64MiB")
	}
	if c.SandboxPids < 16 {
		bad("sandbox_pids: must be at least 16")
	}
	if c.SandboxLayer < 1<<20 {
		bad("sandbox_layer: must be at least 1MiB")
	}
	if c.SandboxUsers != 0 && (c.SandboxUsers < 65536 || c.SandboxUsers+c.SandboxMax*65536 > usersEnd) {
		bad("sandbox_users: must be 0, or from 65536 with room for sandbox_max times 65536 below %d", usersEnd)
	}
	if !filepath.IsAbs(c.SandboxRunDir) || filepath.Clean(c.SandboxRunDir) != c.SandboxRunDir || len(c.SandboxRunDir) > 64 {
		bad("sandbox_run_dir: %q must be an absolute, clean path of at most 64 bytes", c.SandboxRunDir)
	}
	for _, text := range c.SandboxImages {
		name, from, _ := strings.Cut(text, "=")
		layout, local := strings.CutPrefix(from, "oci:")
		if name == "" || local && !filepath.IsAbs(layout) || !strings.Contains(from, "/") {
			bad("sandbox_images: %q must be NAME=/DIRECTORY, NAME=oci:/PATH[#TAG] or NAME=HOST/IMAGE[:TAG]", text)
		}
	}
	return errs
}

func (c *Config) checkListen() []error {
	if c.Listen == "none" {
		if c.Dev {
			return []error{errors.New("listen: --dev needs a loopback address")}
		}
		return nil
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return []error{fmt.Errorf("listen: %q is not HOST:PORT with a port of 0 to 65535", c.Listen)}
	}
	loopback := host == "localhost" || (net.ParseIP(host) != nil && net.ParseIP(host).IsLoopback())
	if c.Dev && !loopback {
		return []error{fmt.Errorf("listen: --dev takes only a loopback address, not %q", c.Listen)}
	}
	if !loopback && c.TLSCert == "" {
		return []error{fmt.Errorf("listen: %q can be reached from other hosts and keys would travel in clear: set tls_cert and tls_key, or listen on loopback behind a proxy", c.Listen)}
	}
	return nil
}

// Write prints the effective configuration as a TOML file that Load reads.
func (c *Config) Write(w io.Writer) error {
	for _, s := range c.settings() {
		text := fmt.Sprintf("%q", s.value.String())
		switch v := s.value.(type) {
		case boolValue, intValue, floatValue:
			text = s.value.String()
		case listValue:
			quoted := make([]string, len(*v.p))
			for i, word := range *v.p {
				quoted[i] = fmt.Sprintf("%q", word)
			}
			text = "[" + strings.Join(quoted, ", ") + "]"
		}
		if _, err := fmt.Fprintf(w, "%s = %s\n", s.name, text); err != nil {
			return err
		}
	}
	return nil
}

// Names tells each setting's name, flag, kind and use, for flags and help.
func Names(each func(name, flag, kind, usage string)) {
	c := DefaultConfig()
	for _, s := range c.settings() {
		usage := s.usage
		if d := s.value.String(); d != "" && d != "0" && d != "false" && !strings.Contains(usage, "(default") {
			usage += " (default " + d + ")"
		}
		each(s.name, s.flag(), s.value.Kind(), usage)
	}
}

// Getenv reads the process's environment.
func Getenv(key string) (string, bool) { return os.LookupEnv(key) }
