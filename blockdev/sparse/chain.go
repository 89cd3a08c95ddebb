package sparse

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"

	"holdfast/blockdev"
	"holdfast/blockdev/serve/overlay"
	"holdfast/internal/sys"
)

const (
	chainFile    = "chain.json"
	chainVersion = 1
	farVersion   = 2 // of one whose base is far away: who does not know that must not read it
	dataSuffix   = ".data"
	mapSuffix    = ".map"
	freshFile    = ".new" // ends the name of an envelope in the making

	// maxLayers bounds how deep a read may have to look.
	maxLayers = 64
)

// chain is what chain.json says: of what files in its directory a layered image
// consists.
type chain struct {
	Version  int      `json:"version"`
	Layers   []string `json:"layers"`             // the top first; each is two files
	Base     string   `json:"base,omitempty"`     // "" for none
	BaseSize int64    `json:"baseSize,omitempty"` // bytes
	// Origin is the image whose bytes the base has, "" for an own one. It may be gone.
	Origin blockdev.ID `json:"origin,omitempty"`
	// Of a base that is far away: Base names what its bytes are, chunk by chunk.
	URL    string `json:"url,omitempty"`
	Digest string `json:"digest,omitempty"` // SHA-256 of that file, hex
	// AddressOf is the image whose address counts where that has changed; "" for Origin.
	AddressOf blockdev.ID `json:"addressOf,omitempty"`
}

// digestForm is the form of a SHA-256.
var digestForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

// partForm is the form of what may be named in a chain: nothing that leads out of
// the directory, nor to another file in it.
var partForm = regexp.MustCompile(`^(layer|base|chunks)-[0-9a-f]{16}$`)

func newPart(kind string) string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return kind + "-" + hex.EncodeToString(b[:])
}

func chainOf(id blockdev.ID) string { return string(id) + "/" + chainFile }

// readChain reads what a layered image consists of; nil for a flat one.
// blockdev.ErrCorrupt for a chain that is none.
func readChain(id blockdev.ID, dir string) (*chain, error) {
	payload, err := readEnvelope(dir+"/"+chainFile, chainOf(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", chainFile, err)
	}
	c := &chain{}
	if err := json.Unmarshal(payload, c); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", chainFile, blockdev.ErrCorrupt, err)
	}
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", chainFile, blockdev.ErrCorrupt, err)
	}
	return c, nil
}

func (c *chain) check() error {
	names := slices.Clone(c.Layers)
	if c.Base != "" {
		names = append(names, c.Base)
	}
	slices.Sort(names)
	switch {
	case c.Version != chainVersion && c.Version != farVersion:
		return fmt.Errorf("version %d, this program knows %d and %d", c.Version, chainVersion, farVersion)
	case c.far() != (c.Version == farVersion) || c.far() != strings.HasPrefix(c.Base, "chunks-"):
		return fmt.Errorf("version %d with a base %q", c.Version, c.Base)
	case c.far() != digestForm.MatchString(c.Digest) || c.far() && overlay.CheckURL(c.URL) != nil:
		return errors.New("an address and a digest that are none")
	case len(c.Layers) == 0:
		return errors.New("it has no layer")
	case len(slices.Compact(slices.Clone(names))) != len(names):
		return errors.New("it has a part twice")
	case (c.Base == "") != (c.BaseSize == 0) || c.BaseSize < 0:
		return fmt.Errorf("a base %q of %d bytes", c.Base, c.BaseSize)
	case c.Origin != "" && !c.Origin.Valid(), c.AddressOf != "" && !c.AddressOf.Valid():
		return fmt.Errorf("its base was made from %q, and is where that of %q is", c.Origin, c.AddressOf)
	}
	for _, name := range names {
		if !partForm.MatchString(name) {
			return fmt.Errorf("a part is called %q", name)
		}
	}
	return nil
}

// files are the names of all files of the chain.
func (c *chain) files() (names []string) {
	for _, l := range c.Layers {
		names = append(names, l+dataSuffix, l+mapSuffix)
	}
	if c.Base != "" {
		names = append(names, c.Base)
	}
	return names
}

// with gives the chain with a layer on top.
func (c *chain) with(top string) *chain {
	over := *c
	over.Layers = append([]string{top}, c.Layers...)
	return &over
}

// below gives the chain without its top.
func (c *chain) below() *chain {
	rest := *c
	rest.Layers = slices.Clone(c.Layers[1:])
	return &rest
}

// writeChain durably makes this the chain of the image in dir; what needs makes
// durable is so before.
func (p *Pool) writeChain(id blockdev.ID, dir string, c *chain, needs ...func() error) error {
	if err := p.renameChain(id, dir, c, needs...); err != nil {
		return err
	}
	if err := p.at("describe.flush"); err != nil {
		return err
	}
	return syncDir(dir)
}

// renameChain is writeChain in a draft, whose directory is flushed by Publish.
func (p *Pool) renameChain(id blockdev.ID, dir string, c *chain, needs ...func() error) error {
	c.Version = chainVersion
	if c.far() {
		c.Version = farVersion
	}
	payload, err := json.Marshal(c)
	if err != nil {
		return err
	}
	p.changing.Lock()
	defer p.changing.Unlock()
	return p.renameEnvelope(dir, chainFile, chainOf(id), payload, needs...)
}

// linkParts gives the files of a chain names in another directory, too. base is what
// its base is called where it is.
func linkParts(c *chain, from, base, to string) error {
	for _, name := range c.files() {
		there := name
		if name == c.Base {
			there = base
		}
		if err := link(from+"/"+there, to+"/"+name); err != nil {
			return err
		}
	}
	return nil
}

// link gives a file another name. Where the filesystem counts no further the caller
// has to copy.
func link(from, to string) error {
	err := os.Link(from, to)
	if sys.IsTooManyLinks(err) {
		return fmt.Errorf("%w: %w", errors.ErrUnsupported, err)
	}
	return noSpace(err)
}

// newLayer makes the files of an empty layer for a volume of size bytes in dir,
// durable but for their names.
func newLayer(dir, name string, size int64) error { return layOut(dir, name, size, overlay.Create) }

// layOut makes the files of an empty layer by overlay.Create, or by overlay.Make.
func layOut(dir, name string, size int64, create func(overlay.Files, int64) error) error {
	f, closeAll, err := openLayer(dir, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	return errors.Join(noSpace(create(f, size)), closeAll())
}

// syncLayer makes a layer's files durable but for their names.
func syncLayer(dir, name string) error {
	f, closeAll, err := openLayer(dir, name, os.O_RDWR)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), closeAll())
}

// openLayer opens the two files of a layer.
func openLayer(dir, name string, flag int) (f overlay.Files, closeAll func() error, err error) {
	data, err := os.OpenFile(dir+"/"+name+dataSuffix, flag, 0o600)
	if err != nil {
		return f, nil, noSpace(err)
	}
	index, err := os.OpenFile(dir+"/"+name+mapSuffix, flag, 0o600)
	if err != nil {
		return f, nil, errors.Join(noSpace(err), data.Close())
	}
	closeAll = func() error { return errors.Join(data.Close(), index.Close()) }
	return overlay.Files{Data: overlay.OSFile{File: data}, Map: overlay.OSFile{File: index}}, closeAll, nil
}

// sweep removes what a crash left beside an image: parts that its chain, which
// decides as long as it is there, does not name. The caller has the image's turn.
func (p *Pool) sweep(dir string, c *chain) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return notFound(err)
	}
	var keep []string
	if c != nil {
		keep = c.files()
	}
	for _, entry := range entries {
		name := entry.Name()
		part := name == chainFile+freshFile || name == flatFresh || c != nil && name == imageFile || partForm.MatchString(trimPart(name))
		if !part || slices.Contains(keep, name) {
			continue
		}
		if err := os.Remove(dir + "/" + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// trimPart takes what a part's file name has behind the part's name off.
func trimPart(name string) string {
	for _, suffix := range []string{dataSuffix, mapSuffix} {
		if len(name) > len(suffix) && name[len(name)-len(suffix):] == suffix {
			return name[:len(name)-len(suffix)]
		}
	}
	return name
}
