package ring

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"

	"github.com/zeebo/xxh3"
)

// Blocks returns the number of blocks of an object of the given size; 0 for an empty one.
func Blocks(size int64) int64 {
	if size <= 0 {
		return 0
	}
	return (size-1)/BlockSize + 1
}

// Owners returns up to n members in order of preference for one block of an object, all of them if n <= 0.
//
// Only Ready members are returned. The first one owns the block. Members on nodes that no earlier member
// of the list is on come first, so that the first copies sit on distinct nodes where there are enough;
// the others follow. A member that does not say its node counts as alone on it. Up to StripeThreshold the
// block number does not matter, and the object is placed whole.
//
// The order depends only on the set of members, their weights and nodes: not on the order of the list,
// nor on addresses, the epoch or the platform.
func (m Membership) Owners(o Object, block int64, n int) []Member {
	return m.order(place(o, block), n)
}

// NameOwners returns up to n members in order of preference for a name of a writable dataset, all of them
// if n <= 0: the first decides which version the name has, the others hold what is not in the bucket yet.
// Nodes, states and weights count as for Owners; the object's bytes, and so its versions, do not.
func (m Membership) NameOwners(dataset, key string, n int) []Member {
	return m.order(xxh3.HashStringSeed(key, xxh3.HashStringSeed(dataset, nameSeed)), n)
}

// order is the rendezvous order of the Ready members for what was hashed to seed.
func (m Membership) order(seed uint64, n int) []Member {
	if n == 1 { // the common call: one pass, and no allocation but the result's
		best, found := rank{}, false
		for i := range m.Members {
			if m.Members[i].State != Ready {
				continue
			}
			if r := m.rank(i, seed); !found || m.less(r, best) < 0 {
				best, found = r, true
			}
		}
		if !found {
			return nil
		}
		return []Member{m.Members[best.index]}
	}

	var buf [64]rank // larger memberships cost one more allocation
	ranks := buf[:0]
	for i := range m.Members {
		if m.Members[i].State == Ready {
			ranks = append(ranks, m.rank(i, seed))
		}
	}
	if len(ranks) == 0 {
		return nil
	}
	slices.SortFunc(ranks, m.less)
	if n <= 0 || n > len(ranks) {
		n = len(ranks)
	}
	owners := make([]Member, 0, n)
	for _, first := range []bool{true, false} {
		for i := range ranks {
			if len(owners) == n {
				return owners
			}
			if ranks[i].taken {
				continue
			}
			if c := m.Members[ranks[i].index]; !first || !onNode(owners, c.Node) {
				ranks[i].taken = true
				owners = append(owners, c)
			}
		}
	}
	return owners
}

// Lister returns the member that lists the bucket for a dataset: the first of the rendezvous order of the
// dataset's name, whatever the weights. It is false when no member is Ready.
func (m Membership) Lister(dataset string) (Member, bool) {
	seed := xxh3.HashStringSeed(dataset, listerSeed)
	best, found := rank{}, false
	for i := range m.Members {
		if m.Members[i].State != Ready {
			continue
		}
		r := m.rank(i, seed)
		r.weight = 1
		if !found || m.less(r, best) < 0 {
			best, found = r, true
		}
	}
	if !found {
		return Member{}, false
	}
	return m.Members[best.index], true
}

func onNode(members []Member, node string) bool {
	if node == "" {
		return false
	}
	return slices.ContainsFunc(members, func(c Member) bool { return c.Node == node })
}

// The seeds keep the election and the placement of names apart from the placement of objects.
const (
	listerSeed = 0x6c697374
	nameSeed   = 0x6e616d65
)

// place hashes what is placed: the object, and its block where blocks are placed one by one.
func place(o Object, block int64) uint64 {
	var b [24]byte
	copy(b[:16], o.ID[:])
	if o.Size > StripeThreshold {
		binary.LittleEndian.PutUint64(b[16:], uint64(block)+1)
	}
	return xxh3.Hash(b[:])
}

// rank is a member's place in one order: the lower cost/weight, the better.
type rank struct {
	cost   uint64
	weight uint32
	index  int32
	taken  bool
}

// rank draws u in (0, 1] for the member from its id and the seed; the cost is -log2(u). Ordering by
// -log(u)/w gives every member a share proportional to its weight, and a change of one member's weight
// moves bytes only to or from that member (Schindelhauer and Schomaker, "Weighted distributed hash
// tables"; the order of Efraimidis and Spirakis's weighted sampling).
func (m Membership) rank(i int, seed uint64) rank {
	c := &m.Members[i]
	return rank{cost: negLog2(mix(xxh3.HashStringSeed(c.ID, seed))), weight: max(c.Weight, 1), index: int32(i)}
}

// less compares cost/weight exactly, as a.cost*b.weight with b.cost*a.weight in 128 bits; ties (next to
// never) go by id, so that the order is total.
func (m Membership) less(a, b rank) int {
	ahi, alo := bits.Mul64(a.cost, uint64(b.weight))
	bhi, blo := bits.Mul64(b.cost, uint64(a.weight))
	return cmp.Or(cmp.Compare(ahi, bhi), cmp.Compare(alo, blo), cmp.Compare(m.Members[a.index].ID, m.Members[b.index].ID))
}

// mix is the finaliser of splitmix64: it spreads what a short id and a seed leave correlated.
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

const (
	logBits     = 10 // the table has 2^logBits steps
	logFraction = 56 // negLog2 is in fixed point with this many fractional bits
)

// logTable[k] is log2(1 + k/2^logBits) in fixed point.
var logTable = func() (t [1<<logBits + 1]uint64) {
	for k := range 1 << logBits {
		// One bit of the logarithm a round: square, and halve when the result reaches 2. All in integers,
		// so that every platform computes the same table (math.Log differs between architectures).
		x := uint64(1)<<63 | uint64(k)<<(63-logBits)
		for bit := logFraction - 1; bit >= 0; bit-- {
			hi, lo := bits.Mul64(x, x)
			if hi>>63 == 1 {
				t[k] |= 1 << bit
				x = hi
			} else {
				x = hi<<1 | lo>>63
			}
		}
	}
	t[1<<logBits] = 1 << logFraction
	return t
}()

// negLog2 returns -log2(u) for u = (h+1)/2^64 in fixed point. It interpolates linearly between the steps
// of logTable, which keeps it monotone, exact at u = 1, and within 0.05 % everywhere.
func negLog2(h uint64) uint64 {
	if h == ^uint64(0) {
		return 0
	}
	x := h + 1
	exp := uint64(63 - bits.LeadingZeros64(x))
	frac := x << (63 - exp) << 1 // what follows the leading one, as a fraction of 2^64
	k := frac >> (64 - logBits)
	rest, _ := bits.Mul64(frac<<logBits, logTable[k+1]-logTable[k])
	return (64-exp)<<logFraction - logTable[k] - rest
}
