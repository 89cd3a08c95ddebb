package vmmtest

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
)

// firecracker is a microVM: drives are given before it boots, and updated after.
type firecracker struct {
	version string
	pci     bool   // started with --enable-pci: drives come and go while it runs
	state   string // of InstanceInfo
	drives  map[string]*drive
	order   []string
}

type drive struct {
	config map[string]any
	file   *os.File
	size   int64
}

func newFirecracker() *firecracker {
	return &firecracker{version: "1.17.0", pci: slices.Contains(os.Args, EnablePCI), state: "Not started", drives: map[string]*drive{}}
}

func (f *firecracker) serve(method, path string, body []byte) (int, any) {
	id, isDrive := strings.CutPrefix(path, "/drives/")
	switch {
	case method == http.MethodGet && path == "/":
		return http.StatusOK, map[string]any{"app_name": "Firecracker", "id": "test", "state": f.state, "vmm_version": f.version}
	case method == http.MethodGet && path == "/vm/config":
		all := []any{}
		for _, id := range f.order {
			all = append(all, f.drives[id].config)
		}
		return http.StatusOK, map[string]any{"drives": all}
	case isDrive && method == http.MethodDelete:
		return f.remove(id)
	case isDrive:
		var config map[string]any
		if err := json.Unmarshal(body, &config); err != nil {
			return refuse("%v", err)
		}
		if config["drive_id"] != id {
			return refuse("The id from the path [%s] does not match the id from the body [%v]!", id, config["drive_id"])
		}
		if method == http.MethodPut {
			return f.put(id, config)
		}
		return f.patch(id, config)
	}
	return refuse("Invalid request method and/or path: %s %s.", method, path)
}

func (f *firecracker) put(id string, config map[string]any) (int, any) {
	if f.state != "Not started" && !f.pci {
		return refuse("The requested operation is not supported after starting the microVM.")
	}
	if strings.ContainsFunc(id, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return refuse("API Resource IDs can only contain alphanumeric characters and underscores.")
	}
	readOnly, given := config["is_read_only"].(bool)
	if !given {
		return refuse("Unable to create the virtio block device: is_read_only is missing")
	}
	d := &drive{config: config}
	if err := d.open(readOnly); err != nil {
		return refuse("Unable to create the virtio block device: BackingFile(%v)", err)
	}
	if old := f.drives[id]; old != nil {
		old.file.Close()
	} else {
		f.order = append(f.order, id)
	}
	for name, value := range map[string]any{"cache_type": "Unsafe", "io_engine": "Sync"} { // the defaults
		if config[name] == nil {
			config[name] = value
		}
	}
	f.drives[id] = d
	return http.StatusNoContent, nil
}

// remove closes the drive of a running microVM at once, whatever the guest does.
func (f *firecracker) remove(id string) (int, any) {
	d := f.drives[id]
	if f.state == "Not started" || !f.pci || d == nil {
		return refuse("Invalid request method and/or path: DELETE drives/%s.", id)
	}
	d.file.Close()
	delete(f.drives, id)
	f.order = slices.DeleteFunc(f.order, func(other string) bool { return other == id })
	return http.StatusNoContent, nil
}

func (f *firecracker) patch(id string, config map[string]any) (int, any) {
	if f.state == "Not started" {
		return refuse("The requested operation is not supported before starting the microVM.")
	}
	d := f.drives[id]
	if d == nil {
		return refuse("Unable to patch the block device: Invalid block device ID")
	}
	if rates, ok := config["rate_limiter"].(map[string]any); ok {
		d.limit(rates)
	}
	path, ok := config["path_on_host"]
	if !ok {
		return http.StatusNoContent, nil
	}
	again := &drive{config: map[string]any{}}
	for k, v := range d.config {
		again.config[k] = v
	}
	again.config["path_on_host"] = path
	readOnly, _ := d.config["is_read_only"].(bool)
	if err := again.open(readOnly); err != nil {
		return refuse("Unable to patch the block device: %v", err)
	}
	d.file.Close()
	f.drives[id] = again
	return http.StatusNoContent, nil
}

// limit changes the budgets that are named; one without a size is no limit.
func (d *drive) limit(rates map[string]any) {
	all := map[string]any{}
	if had, ok := d.config["rate_limiter"].(map[string]any); ok {
		maps.Copy(all, had)
	}
	maps.Copy(all, rates)
	maps.DeleteFunc(all, func(_ string, b any) bool {
		bucket, _ := b.(map[string]any)
		size, _ := bucket["size"].(float64)
		return size == 0
	})
	if d.config["rate_limiter"] = all; len(all) == 0 {
		delete(d.config, "rate_limiter")
	}
}

func (d *drive) open(readOnly bool) (err error) {
	path, _ := d.config["path_on_host"].(string)
	d.file, d.size, err = openImage(path, readOnly)
	return err
}

func openImage(path string, readOnly bool) (*os.File, int64, error) {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	file, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, 0, err
	}
	size, err := file.Seek(0, 2) // of a device, too
	return file, size, err
}

func (f *firecracker) disks() map[string]Disk {
	all := map[string]Disk{}
	for id, d := range f.drives {
		text, _ := json.Marshal(d.config)
		path, _ := d.config["path_on_host"].(string)
		readOnly, _ := d.config["is_read_only"].(bool)
		all[id] = Disk{Path: path, Size: d.size, ReadOnly: readOnly, Config: text}
	}
	return all
}

func (f *firecracker) steer(what string) error {
	if version, found := strings.CutPrefix(what, "version "); found {
		f.version = version
		return nil
	}
	next := map[string]string{"Not started boot": "Running", "Running pause": "Paused", "Paused resume": "Running"}[f.state+" "+what]
	if next == "" {
		return fmt.Errorf("a microVM that is %s cannot %s", f.state, what)
	}
	f.state = next
	return nil
}

func refuse(format string, args ...any) (int, any) {
	return http.StatusBadRequest, map[string]string{"fault_message": fmt.Sprintf(format, args...)}
}
