package worker

import (
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/stepcache/stepcache/cache/wire"
)

// What can be wrong with a worker as a whole. Each kind has one problem at a time, set and cleared by
// the loop that meets it.
type problem string

const (
	problemSources  problem = "sources"  // a mount's source cannot be opened
	problemSnapshot problem = "snapshot" // there is no snapshot yet
	problemRefresh  problem = "refresh"  // listing again, or taking over what was listed, failed; the old snapshot serves on
	problemBucket   problem = "bucket"   // the bucket refuses to be read
	problemAway     problem = "away"     // the bucket fails what it is asked, and what is held is served
	problemMembers  problem = "membership"
	problemKeys     problem = "keys"
	problemGateway  problem = "gateway"  // the access keys of the S3 endpoint cannot be read
	problemStopping problem = "stopping" // it is being stopped, and has something left to do
)

// blocking are the problems with which a worker cannot serve.
var blocking = []problem{problemStopping, problemSources, problemBucket, problemSnapshot}

// problems are told in Status and by /readyz, and logged once each time they change.
type problems struct {
	log *slog.Logger

	mu   sync.Mutex
	text map[problem]string
	errs map[problem]error
}

// set records why kind is wrong, or with nil that it is not any more.
func (p *problems) set(kind problem, err error) {
	p.mu.Lock()
	old := p.text[kind]
	if err == nil {
		delete(p.text, kind)
		delete(p.errs, kind)
	} else {
		p.text[kind], p.errs[kind] = err.Error(), err
	}
	p.mu.Unlock()
	switch {
	case err != nil && err.Error() != old && (errors.Is(err, errNoSnapshot) || errors.Is(err, wire.ErrUnknownSnapshot)):
		// As at every start, here and at the worker that lists, which tells what keeps it from it.
		p.log.Info("worker waits for its first snapshot", "reason", err)
	case err != nil && err.Error() != old:
		p.log.Warn("worker has a problem", "kind", string(kind), "error", err)
	case err == nil && old != "":
		p.log.Info("problem is over", "kind", string(kind))
	}
}

// String is all problems for people, one after the other; empty when there is none.
func (p *problems) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var texts []string
	for _, k := range slices.Sorted(maps.Keys(p.text)) {
		texts = append(texts, p.text[k])
	}
	return strings.Join(texts, "; ")
}

// of is what is wrong of one kind; nil when nothing is.
func (p *problems) of(kind problem) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.errs[kind]
}

// ready is nil when the worker can serve.
func (p *problems) ready() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first error
	for _, k := range blocking { // an unopened source is why there is no snapshot: the cause comes first
		if err := p.errs[k]; err != nil && first == nil {
			first = err
		}
	}
	return first
}
