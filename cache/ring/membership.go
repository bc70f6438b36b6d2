package ring

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
)

// maxList bounds what Load reads: some ten thousand members.
const maxList = 8 << 20

// Validate says what is wrong with the list: ids must be there and unique, Addr must be host:port (so
// must Control, where it is given), states must be known. An empty list is valid: nobody is there yet.
func (m Membership) Validate() error {
	seen := make(map[string]int, len(m.Members))
	for i, c := range m.Members {
		if c.ID == "" {
			return fmt.Errorf("membership epoch %d: member %d has no id", m.Epoch, i)
		}
		if j, ok := seen[c.ID]; ok {
			return fmt.Errorf("membership epoch %d: members %d and %d have the same id %q; ids must be unique", m.Epoch, j, i, c.ID)
		}
		seen[c.ID] = i
		if err := hostPort(c.Addr); err != nil {
			return fmt.Errorf("membership epoch %d: member %q: addr %q: %w", m.Epoch, c.ID, c.Addr, err)
		}
		if c.Control != "" {
			if err := hostPort(c.Control); err != nil {
				return fmt.Errorf("membership epoch %d: member %q: control %q: %w", m.Epoch, c.ID, c.Control, err)
			}
		}
		if c.State != Ready && c.State != Leaving {
			return fmt.Errorf("membership epoch %d: member %q: state %q is not known; want %s or %s", m.Epoch, c.ID, c.State, Ready, Leaving)
		}
	}
	return nil
}

func hostPort(s string) error {
	if s == "" {
		return errors.New("is missing; want host:port")
	}
	host, port, err := net.SplitHostPort(s)
	if err != nil || host == "" || port == "" {
		return errors.New("want host:port")
	}
	return nil
}

// UnmarshalJSON refuses a member without an id at once: a list of nothing but those, which anybody's program may send, takes
// fifty times its size.
func (m *Member) UnmarshalJSON(b []byte) error {
	type plain Member
	if err := json.Unmarshal(b, (*plain)(m)); err != nil {
		return err
	}
	if m.ID == "" {
		return errors.New("a member has no id")
	}
	return nil
}

// Parse decodes and validates a list in JSON. Fields that it does not know are ignored, since newer
// controllers write for older workers.
func Parse(b []byte) (Membership, error) {
	var m Membership
	if err := json.Unmarshal(b, &m); err != nil {
		return Membership{}, fmt.Errorf("membership: not a valid list: %w", err)
	}
	if err := m.Validate(); err != nil {
		return Membership{}, err
	}
	return m, nil
}

// Load reads a list from a file.
func Load(path string) (Membership, error) {
	f, err := os.Open(path)
	if err != nil {
		return Membership{}, fmt.Errorf("membership: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxList+1))
	if err != nil {
		return Membership{}, fmt.Errorf("membership: %w", err)
	}
	if len(b) > maxList {
		return Membership{}, fmt.Errorf("membership file %s: longer than %d bytes", path, maxList)
	}
	m, err := Parse(b)
	if err != nil {
		return Membership{}, fmt.Errorf("file %s: %w", path, err)
	}
	return m, nil
}
