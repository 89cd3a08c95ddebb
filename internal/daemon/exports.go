package daemon

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"holdfast/blockdev/attach/export"
	"holdfast/internal/preflight"
)

// exportNetwork is where exports over TLS are reached, the zero Network for nowhere.
func (c *Config) exportNetwork() (export.Network, error) {
	if c.ExportAddress == "" {
		return export.Network{}, nil
	}
	n := export.Network{Name: c.ExportName, Certificate: c.ExportCert, Key: c.ExportKey, Authorities: c.ExportCA}
	var err error
	if n.Address, err = netip.ParseAddr(c.ExportAddress); err != nil {
		return n, fmt.Errorf("export_address: %q is not an IP address", c.ExportAddress)
	}
	if n.Address.IsUnspecified() && n.Name == "" {
		return n, fmt.Errorf("export_address: for %q export_name is needed, which clients are told", c.ExportAddress)
	}
	if _, err := fmt.Sscanf(c.ExportPorts+";", "%d-%d;", &n.First, &n.Last); err != nil || n.First < 1 || n.Last < n.First || n.Last > 65535 {
		return n, fmt.Errorf("export_ports: %q is not of the form FIRST-LAST", c.ExportPorts)
	}
	if c.ExportCert == "" || c.ExportKey == "" || c.ExportCA == "" {
		return n, fmt.Errorf("export_address: export_cert, export_key and export_client_ca are needed as well: exports are open to nobody without a certificate")
	}
	return n, nil
}

// expiresSoon is when a certificate's end is told of before it comes.
const expiresSoon = 14 * 24 * time.Hour

// exportCheck says whether volumes can be exported over the network. That they cannot
// keeps the daemon from nothing else.
func exportCheck(c Config) preflight.Check {
	check := preflight.Check{Name: "exports over TLS", Status: preflight.OK, Found: "off"}
	network, err := c.exportNetwork()
	if c.ExportAddress == "" || err != nil { // checked before
		return check
	}
	check.Found = c.ExportAddress + ", ports " + c.ExportPorts
	expires, err := network.Expires()
	switch {
	case err != nil:
		check.Status, check.Found = preflight.Warn, strings.TrimPrefix(err.Error(), "export.Expires: ")
		check.Consequence = "exports with transport tls are refused, and those that are there keep the certificates that they have"
		check.Fix = "look at the files of export_cert, export_key and export_client_ca"
	case time.Until(expires) < expiresSoon:
		check.Status, check.Found = preflight.Warn, "the certificate in "+c.ExportCert+" ends at "+expires.UTC().Format(time.RFC3339)
		check.Consequence = "after that clients of exports with transport tls cannot connect any more"
		check.Fix = "replace it: it is read again, and connections go on"
	}
	return check
}
