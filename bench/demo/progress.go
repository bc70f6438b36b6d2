package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// progress shows how far a long part is: a bar on a terminal, a line every few seconds elsewhere.
type progress struct {
	name  string
	total int64
	bar   *progressbar.ProgressBar // nil where there is no terminal

	mu   sync.Mutex
	done int64
	last time.Time
}

const lineEvery = 5 * time.Second

func newProgress(name string, total int64) *progress {
	p := &progress{name: name, total: total, last: time.Now()}
	if term.IsTerminal(int(os.Stderr.Fd())) {
		p.bar = progressbar.NewOptions64(total, progressbar.OptionSetDescription(name), progressbar.OptionShowCount(),
			progressbar.OptionShowIts(), progressbar.OptionSetWriter(os.Stderr), progressbar.OptionClearOnFinish())
	}
	return p
}

func (p *progress) add(n int64) {
	if p.bar != nil {
		_ = p.bar.Add64(n)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += n
	if p.done == p.total || time.Since(p.last) >= lineEvery {
		p.last = time.Now()
		fmt.Fprintf(os.Stderr, "%s: %d of %d\n", p.name, p.done, p.total)
	}
}

func (p *progress) finish() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
