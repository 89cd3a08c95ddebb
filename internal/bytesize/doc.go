// Package bytesize reads and writes numbers of bytes as people do: "20GiB" in a
// setting, "1.5 GiB" in a table.
package bytesize
