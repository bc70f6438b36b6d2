package client

import (
	"bytes"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/stepcache/stepcache/cache/wire"
)

// lines collects what is logged.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// with are the lines that have all of the words.
func (l *lines) with(words ...string) (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for line := range strings.Lines(l.buf.String()) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		out = append(out, line)
	}
	return out
}

func (l *lines) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) } // as programs have it: from Info on

// A worker that cannot be reached is told of once, with the reason, and so is its return; one that flaps floods nothing.
func TestAWorkerThatCannotBeReachedIsToldOfOnce(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 100)})
	k.start("a")
	var log lines
	c := k.dial(func(c *Config) { c.Logger = log.logger() })
	p := c.members.view().peers["a"]
	for range 3 {
		k.worker("a").stop()
		c.Forget(k.index("f"))
		read := make(chan error, 1)
		go func() { read <- checkRead(testContext(t), c, k.index("f"), k.data["f"], 0, 100) }()
		eventually(t, "the worker is known to be down", p.isDown)
		k.worker("a").restart()
		if err := wait(t, "the read", read); err != nil {
			t.Fatal(err)
		}
	}
	if got := log.with("level=WARN", "cannot be reached", "worker=a", "dataset="+testDataset, "refused"); len(got) != 1 {
		t.Errorf("%d lines tell why the worker cannot be reached: %q", len(got), log.buf.String())
	}
	eventually(t, "its return is told", func() bool { return len(log.with("can be reached again")) > 0 })
	if got := log.with("level=INFO", "can be reached again", "worker=a"); len(got) != 1 {
		t.Errorf("%d lines tell that it is back: %q", len(got), log.buf.String())
	}
}

// The same of one whose connection hangs.
func TestAWorkerThatHangsIsToldOf(t *testing.T) {
	k := newTier(t, map[string][]byte{"f": content(1, 100)})
	k.timing = impatient()
	k.start("a", "b")
	var log lines
	c := k.dial(func(c *Config) { c.Logger = log.logger() })
	w := k.owners("f", 0)[0]
	if err := checkRead(testContext(t), c, k.index("f"), k.data["f"], 0, 100); err != nil {
		t.Fatal(err)
	}
	w.pause()
	defer w.resume()
	c.Forget(k.index("f"))
	if err := checkRead(testContext(t), c, k.index("f"), k.data["f"], 0, 100); err != nil {
		t.Fatal(err)
	}
	if got := log.with("level=WARN", "cannot be reached", "worker="+w.id); len(got) != 1 {
		t.Errorf("%d lines: %q", len(got), log.buf.String())
	}
}

// The same of one that is asked for the names of a writable dataset.
func TestAWorkerThatCannotBeAskedForNamesIsToldOf(t *testing.T) {
	keys := wire.GenerateKeys()
	addr := nobodys(t, keys, func(rw http.ResponseWriter, r *http.Request) { rw.Write([]byte("{}")) })
	var log lines
	n, err := DialNames(testContext(t), Config{Dataset: "ns/data", Seeds: []string{addr}, Keys: keys, Logger: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for range 2 {
		if _, _, err := n.attempt(testContext(t), "127.0.0.1:1", wire.PathNames, nil, 100); err == nil {
			t.Fatal("nobody listens there")
		}
	}
	if got := log.with("level=WARN", "cannot be reached", "worker=127.0.0.1:1", "refused"); len(got) != 1 {
		t.Errorf("%d lines: %q", len(got), log.buf.String())
	}
}
