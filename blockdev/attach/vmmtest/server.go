package vmmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
)

// The environment of a server's process.
const (
	envKind   = "HOLDFAST_VMMTEST_KIND"
	envSocket = "HOLDFAST_VMMTEST_SOCKET"
)

// The kinds of server.
const (
	Firecracker     = "firecracker"
	CloudHypervisor = "cloud-hypervisor"
	Other           = "other" // an HTTP server that is no VMM
)

// EnablePCI is the argument with which Firecracker has hot-plug.
const EnablePCI = "--enable-pci"

// Fault is what a server does with the next requests of a kind instead of answering
// as it should.
type Fault struct {
	Request string // "PUT /drives": what method and path begin with
	How     string
	Status  int // of FaultStatus
	Times   int // how often; 0: always
}

// Ways to fail.
const (
	FaultStatus  = "status"  // refuses, and does nothing
	FaultHang    = "hang"    // does nothing, and never answers
	FaultHalf    = "half"    // does nothing, and stops in the middle of an answer
	FaultGarbage = "garbage" // does nothing, and answers what is not JSON
	FaultLost    = "lost"    // does it, and ends the connection without an answer
	FaultDie     = "die"     // does it, and the process ends
)

// Seen is what a server tells a test.
type Seen struct {
	Requests   []string // "PUT /drives/a {body}", in order
	Violations []string // of the published document
	Disks      map[string]Disk
}

// Disk is a disk as the guest would see it.
type Disk struct {
	Path     string
	Size     int64
	ReadOnly bool
	Config   json.RawMessage // as it was given
}

// vmm is the state machine of a VMM.
type vmm interface {
	// serve answers one request: a status and a body, nil for none.
	serve(method, path string, body []byte) (int, any)
	disks() map[string]Disk
	// steer does what a person at the VMM's console or in the guest would do.
	steer(what string) error
}

type server struct {
	mu         sync.Mutex
	machine    vmm
	doc        *document
	faults     []Fault
	requests   []string
	violations []string
}

// Main serves and never returns in a process that Start has started; otherwise it
// does nothing. TestMain calls it first.
func Main() {
	kind := os.Getenv(envKind)
	if kind == "" {
		return
	}
	if err := serve(kind, os.Getenv(envSocket)); err != nil {
		fmt.Fprintln(os.Stderr, "vmmtest:", err)
		os.Exit(1)
	}
}

func serve(kind, socket string) error {
	s := &server{}
	var err error
	switch kind {
	case Firecracker:
		s.machine = newFirecracker()
		s.doc, err = load("firecracker.yaml")
	case CloudHypervisor:
		s.machine = newCloudHypervisor()
		s.doc, err = load("cloud-hypervisor.yaml")
	}
	if err != nil {
		return err
	}
	api, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go func() { _ = http.Serve(api, http.HandlerFunc(s.api)) }() //nolint:gosec // a test's server
	control := http.NewServeMux()
	control.HandleFunc("POST /fault", s.fault)
	control.HandleFunc("POST /steer", s.steer)
	control.HandleFunc("GET /seen", s.seen)
	ctl, err := net.Listen("unix", socket+".ctl")
	if err != nil {
		return err
	}
	fmt.Println("ready")
	go func() { // the test has ended
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	return http.Serve(ctl, control) //nolint:gosec // a test's server
}

// api answers the VMM's own API.
func (s *server) api(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	s.requests = append(s.requests, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+string(body)))
	fault := s.next(r)
	s.mu.Unlock()
	switch fault.How {
	case FaultStatus:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(fault.Status)
		_, _ = io.WriteString(w, `{"fault_message":"told to fail at /secret/path"}`)
		return
	case FaultHang:
		<-r.Context().Done()
		return
	case FaultGarbage:
		_, _ = io.WriteString(w, "<html>")
		return
	case FaultHalf:
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, `{"state":`)
		panic(http.ErrAbortHandler)
	}
	status, header, text := s.answer(r, body)
	switch fault.How {
	case FaultLost:
		panic(http.ErrAbortHandler)
	case FaultDie:
		os.Exit(3)
	}
	for k, v := range header {
		w.Header()[k] = v
	}
	w.WriteHeader(status)
	_, _ = w.Write(text)
}

// next takes the fault that is due for a request; the zero Fault for none.
func (s *server) next(r *http.Request) Fault {
	for i, f := range s.faults {
		if !strings.HasPrefix(r.Method+" "+r.URL.Path, f.Request) {
			continue
		}
		if f.Times > 0 {
			if s.faults[i].Times--; s.faults[i].Times == 0 {
				s.faults = append(s.faults[:i:i], s.faults[i+1:]...)
			}
		}
		return f
	}
	return Fault{}
}

// answer lets the state machine answer, between two looks at the document.
func (s *server) answer(r *http.Request, body []byte) (int, http.Header, []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.machine == nil {
		return http.StatusOK, http.Header{"Content-Type": {"application/json"}}, []byte(`{"hello":"world"}`)
	}
	if f, ok := s.machine.(*firecracker); ok && f.pci && r.Method == http.MethodDelete && len(body) == 0 {
		// Hot-plug is a developer preview, which the API's document does not have: the
		// project's docs/device-hotplug.md does.
		status, out := f.serve(r.Method, r.URL.Path, nil)
		text, _ := json.Marshal(out)
		return status, http.Header{"Content-Type": {"application/json"}}, text
	}
	in, err := s.doc.request(r, body)
	if err != nil {
		s.violations = append(s.violations, err.Error())
		return http.StatusBadRequest, nil, nil
	}
	status, out := s.machine.serve(r.Method, r.URL.Path, body)
	header, text := http.Header{}, []byte(nil)
	if out != nil {
		header.Set("Content-Type", "application/json")
		if text, err = json.Marshal(out); err != nil {
			s.violations = append(s.violations, err.Error())
		}
	}
	if err := s.doc.answer(in, status, header, text); err != nil {
		s.violations = append(s.violations, fmt.Sprintf("this server's own answer to %s %s: %v", r.Method, r.URL.Path, err))
	}
	return status, header, text
}

func (s *server) fault(w http.ResponseWriter, r *http.Request) {
	var f Fault
	if err := json.NewDecoder(r.Body).Decode(&f); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.How == "" {
		s.faults = nil
		return
	}
	s.faults = append(s.faults, f)
}

func (s *server) steer(w http.ResponseWriter, r *http.Request) {
	var what bytes.Buffer
	_, _ = what.ReadFrom(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.machine.steer(what.String()); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
	}
}

func (s *server) seen(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seen := Seen{Requests: s.requests, Violations: s.violations}
	if s.machine != nil {
		seen.Disks = s.machine.disks()
	}
	_ = json.NewEncoder(w).Encode(seen)
}
