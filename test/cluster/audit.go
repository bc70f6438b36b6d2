package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// auditEvent is what is read of an event of the audit log.
type auditEvent struct {
	Verb      string `json:"verb"`
	UserAgent string `json:"userAgent"`
	User      struct {
		Name string `json:"username"`
	} `json:"user"`
	Object struct {
		Group       string `json:"apiGroup"`
		Resource    string `json:"resource"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
}

// Requests prints how often each user has done what so far, most first. A test that wants to know what
// happened meanwhile counts before and after.
func (c *Cluster) Requests(w io.Writer) error {
	f, err := os.Open(c.auditLog())
	if errors.Is(err, os.ErrNotExist) {
		return errors.New("there is no audit log yet; `cluster up` starts the cluster")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	type key struct{ user, agent, verb, object string }
	counts := map[key]int{}
	err = readAudit(f, func(e auditEvent) {
		object := e.Object.Resource
		if e.Object.Group != "" {
			object += "." + e.Object.Group
		}
		if e.Object.Subresource != "" {
			object += "/" + e.Object.Subresource
		}
		agent, _, _ := strings.Cut(e.UserAgent, "/")
		counts[key{e.User.Name, agent, e.Verb, object}]++
	})
	if err != nil {
		return fmt.Errorf("read %s: %w", f.Name(), err)
	}
	var keys []key
	for k := range counts {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		if d := counts[b] - counts[a]; d != 0 {
			return d
		}
		return strings.Compare(a.user+a.agent+a.verb+a.object, b.user+b.agent+b.verb+b.object)
	})
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "REQUESTS\tUSER\tPROGRAM\tVERB\tOBJECT")
	for _, k := range keys {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\n", counts[k], k.user, k.agent, k.verb, k.object)
	}
	return t.Flush()
}

// readAudit calls f with every event. The last line may be half written; it is left out.
func readAudit(r io.Reader, f func(auditEvent)) error {
	lines := bufio.NewReaderSize(r, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var e auditEvent
		if err := json.Unmarshal(line, &e); err != nil {
			return err
		}
		f(e)
	}
}
