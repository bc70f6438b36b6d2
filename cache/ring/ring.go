// Package ring decides which worker holds which bytes: weighted rendezvous hashing over the membership.
//
// It owns the membership list, its epoch, and placement arithmetic. All functions are pure; a
// Membership is immutable once made and safe for concurrent use. There is no failure but a list that
// does not validate.
//
// It may import cache/source (for ID) and nothing else of this module.
package ring

import "github.com/stepcache/stepcache/cache/source"

// BlockSize is the length in bytes of a block: the unit of fetch, placement of striped files and
// eviction. Blocks are aligned to it; the last block of an object is shorter.
const BlockSize = 4 << 20

// StripeThreshold is the size in bytes above which an object is striped over the workers block by
// block, so that every worker's network serves it. Up to it an object is placed whole, so that a step
// can be sent to its file.
const StripeThreshold = 1 << 30

// State of a member.
type State string

// Ready members own bytes. Leaving members own nothing new but still serve what they hold.
const (
	Ready   State = "Ready"
	Leaving State = "Leaving"
)

// Member is one worker.
type Member struct {
	// ID is the stable name that placement hashes (the pod's name, not its address).
	ID string `json:"id"`
	// Node is the machine it runs on; copies go to distinct nodes where there are enough.
	Node string `json:"node,omitempty"`
	// Addr is the host:port of the block protocol.
	Addr string `json:"addr"`
	// Control is the host:port of the HTTP control endpoint.
	Control string `json:"control"`
	// Socket is the path of the Unix socket that hands out descriptors to readers of the same node.
	Socket string `json:"socket,omitempty"`
	// Weight is the share of the bytes it takes, relative to the others; zero means 1.
	Weight uint32 `json:"weight,omitempty"`
	State  State  `json:"state"`
	// Joined is the epoch at which it came, with nothing, to others that held bytes: those that were there
	// before may hold what it owns now. Zero: it did not. Placement does not look at it.
	Joined uint64 `json:"joined,omitempty"`
}

// Membership is the list of workers at one epoch.
type Membership struct {
	// Epoch grows by one with every change, unless the list before was lost: who finds a number left out takes it
	// that it missed a list. Reads tolerate a stale one, writes refuse it.
	Epoch   uint64   `json:"epoch"`
	Members []Member `json:"members"`
}

// Object is what placement needs to know of an object version.
type Object struct {
	ID   source.ID
	Size int64
}
