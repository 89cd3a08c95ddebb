package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"sigs.k8s.io/yaml"
)

const (
	formatTable = "table"
	formatJSON  = "json"
	formatYAML  = "yaml"
)

func checkFormat(format string) error {
	switch format {
	case formatTable, formatJSON, formatYAML:
		return nil
	}
	return fmt.Errorf("--output: %q is not one of table, json, yaml", format)
}

// show prints v as asked for: whole as JSON or YAML, or through table.
func (a *app) show(v any, table func(*rows)) error {
	switch a.output {
	case formatJSON:
		enc := json.NewEncoder(a.out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	case formatYAML:
		b, err := yaml.Marshal(v)
		if err == nil {
			_, err = a.out.Write(b)
		}
		return err
	}
	return writeTable(a.out, table)
}

// rows is a table being filled.
type rows struct{ w io.Writer }

func (r *rows) add(cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = cell(c)
	}
	fmt.Fprintln(r.w, strings.Join(text, "\t"))
}

func writeTable(w io.Writer, fill func(*rows)) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fill(&rows{w: tw})
	return tw.Flush()
}

// cell writes a value; what tenants wrote cannot steer a terminal.
func cell(v any) string {
	switch v := v.(type) {
	case time.Time:
		if v.IsZero() {
			return "-"
		}
		return v.UTC().Format("2006-01-02 15:04:05")
	case string:
		if v == "" {
			return "-"
		}
		return printable(v)
	}
	return fmt.Sprint(v)
}

// printable shows control characters (tab and line end too) as what they are.
func printable(s string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	quoted := fmt.Sprintf("%q", s)
	return quoted[1 : len(quoted)-1]
}
