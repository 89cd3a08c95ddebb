package vmmtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
)

// cloudHypervisor is a VMM with at most one VM, whose disks come and go while it
// runs: a disk that is to go is out of the configuration at once, and closed when
// the guest has let it go.
type cloudHypervisor struct {
	version string
	state   string // "" while there is no VM
	config  []map[string]any
	open    map[string]*openDisk // of a VM that was booted
	leaving []string             // asked of the guest
	deaf    bool
	memory  map[string]any // of the configuration
	shared  bool           // all of it
}

// openDisk is a file, or a connection to who serves it.
type openDisk struct {
	config map[string]any
	file   *os.File
	line   net.Conn
	size   int64
}

func (d *openDisk) close() {
	if d.line != nil {
		d.line.Close()
		return
	}
	d.file.Close()
}

func newCloudHypervisor() *cloudHypervisor {
	return &cloudHypervisor{version: "v51.1", memory: map[string]any{"size": 1 << 30}, open: map[string]*openDisk{}}
}

func (c *cloudHypervisor) serve(method, path string, body []byte) (int, any) {
	call := method + " " + strings.TrimPrefix(path, "/api/v1/")
	if call == "GET vmm.ping" {
		return http.StatusOK, map[string]any{"build_version": c.version, "version": c.version, "pid": os.Getpid(), "features": []string{}}
	}
	if c.state == "" {
		return http.StatusNotFound, nil
	}
	var in map[string]any
	if len(body) > 0 {
		if err := json.Unmarshal(body, &in); err != nil {
			return http.StatusBadRequest, nil
		}
	}
	id, _ := in["id"].(string)
	switch call {
	case "GET vm.info":
		tree := map[string]any{}
		for id := range c.open {
			tree[id] = map[string]any{"id": id, "resources": []any{}, "children": []string{}, "pci_bdf": "0000:00:05.0"}
		}
		return http.StatusOK, map[string]any{
			"config": map[string]any{"payload": map[string]any{}, "memory": c.memory, "disks": append([]map[string]any{}, c.config...)},
			"state":  c.state, "device_tree": tree,
		}
	case "GET vm.counters":
		all := map[string]map[string]int64{}
		for id := range c.open {
			all[id] = map[string]int64{"read_ops": 1, "read_bytes": 4096, "write_ops": 2, "write_bytes": 8192}
		}
		return http.StatusOK, all
	case "PUT vm.add-disk":
		return c.add(id, in)
	case "PUT vm.resize-disk":
		return c.resize(id, in)
	case "PUT vm.remove-device":
		return c.remove(id)
	}
	return http.StatusNotFound, nil
}

func (c *cloudHypervisor) booted() bool { return c.state == "Running" || c.state == "Paused" }

func (c *cloudHypervisor) index(id string) int {
	return slices.IndexFunc(c.config, func(d map[string]any) bool { return d["id"] == id })
}

func (c *cloudHypervisor) add(id string, in map[string]any) (int, any) {
	if c.index(id) >= 0 || c.open[id] != nil {
		return http.StatusConflict, nil
	}
	if serial, _ := in["serial"].(string); len(serial) > 20 {
		return http.StatusBadRequest, nil
	}
	if !c.booted() {
		c.config = append(c.config, in)
		return http.StatusNoContent, nil
	}
	if err := c.openDisk(id, in); err != nil {
		return http.StatusInternalServerError, nil
	}
	c.config = append(c.config, in)
	return http.StatusOK, map[string]any{"id": id, "bdf": "0000:00:05.0"}
}

func (c *cloudHypervisor) openDisk(id string, config map[string]any) error {
	if served, _ := config["vhost_user"].(bool); served {
		return c.call(id, config)
	}
	path, _ := config["path"].(string)
	readOnly, _ := config["readonly"].(bool)
	file, size, err := openImage(path, readOnly)
	if err != nil {
		return err
	}
	c.open[id] = &openDisk{config: config, file: file, size: size}
	return nil
}

// call connects to who serves a disk by vhost-user.
func (c *cloudHypervisor) call(id string, config map[string]any) error {
	if !c.shared {
		return errors.New("memory is not shared")
	}
	socket, _ := config["vhost_socket"].(string)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	c.open[id] = &openDisk{config: config, line: conn}
	return nil
}

func (c *cloudHypervisor) resize(id string, in map[string]any) (int, any) {
	d := c.open[id]
	if d == nil {
		return http.StatusNotFound, nil
	}
	if d.file == nil {
		return http.StatusInternalServerError, nil
	}
	size, _ := in["desired_size"].(float64)
	info, err := d.file.Stat()
	if err != nil {
		return http.StatusInternalServerError, nil
	}
	if info.Mode().IsRegular() { // it sets the size of an image itself
		if err := d.file.Truncate(int64(size)); err != nil {
			return http.StatusInternalServerError, nil
		}
	}
	d.size = int64(size)
	return http.StatusNoContent, nil
}

func (c *cloudHypervisor) remove(id string) (int, any) {
	i := c.index(id)
	if i < 0 && c.open[id] == nil {
		return http.StatusNotFound, nil
	}
	if i >= 0 {
		c.config = slices.Delete(c.config, i, i+1)
	}
	if c.open[id] != nil {
		if !slices.Contains(c.leaving, id) {
			c.leaving = append(c.leaving, id)
		}
		c.eject()
	}
	return http.StatusNoContent, nil
}

// eject closes what the guest lets go: a guest that runs and listens.
func (c *cloudHypervisor) eject() {
	if c.deaf || c.state != "Running" {
		return
	}
	for _, id := range c.leaving {
		c.open[id].close()
		delete(c.open, id)
	}
	c.leaving = nil
}

func (c *cloudHypervisor) disks() map[string]Disk {
	all := map[string]Disk{}
	for id, d := range c.open {
		text, _ := json.Marshal(d.config)
		path, _ := d.config["path"].(string)
		readOnly, _ := d.config["readonly"].(bool)
		all[id] = Disk{Path: path, Size: d.size, ReadOnly: readOnly, Config: text}
	}
	return all
}

func (c *cloudHypervisor) steer(what string) error {
	switch what {
	case "deaf", "release":
		c.deaf = what == "deaf"
		c.eject()
		return nil
	case "share", "share zones", "share a zone":
		c.shared = what != "share a zone"
		c.memory = map[string]any{"size": 1 << 30, "shared": true}
		if what != "share" {
			c.memory = map[string]any{"size": 0, "zones": []map[string]any{{"id": "a", "size": 1 << 30, "shared": true}, {"id": "b", "size": 1 << 30, "hugepages": c.shared}}}
		}
		return nil
	case "old":
		c.version = "v50.0"
		return nil
	case "delete":
		return c.halt("")
	}
	next := map[string]string{
		" create": "Created", "Created boot": "Running", "Shutdown boot": "Running",
		"Running pause": "Paused", "Paused resume": "Running", "Running shutdown": "Shutdown",
	}[c.state+" "+what]
	switch {
	case next == "":
		return fmt.Errorf("a VM that is %q cannot %s", c.state, what)
	case next == "Shutdown":
		return c.halt(next)
	case what == "boot":
		for _, config := range c.config {
			id, _ := config["id"].(string)
			if err := c.openDisk(id, config); err != nil {
				return err
			}
		}
	}
	c.state = next
	c.eject()
	return nil
}

// halt ends the VM, and with it every disk.
func (c *cloudHypervisor) halt(next string) error {
	for _, d := range c.open {
		d.close()
	}
	clear(c.open)
	c.leaving, c.state = nil, next
	if next == "" {
		c.config = nil
	}
	return nil
}
