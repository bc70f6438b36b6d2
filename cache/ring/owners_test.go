package ring

import (
	"encoding/binary"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stepcache/stepcache/cache/source"
)

// workers makes n Ready members on as many nodes, with weight 1 unless weights say otherwise.
func workers(n int, weights ...uint32) Membership {
	m := Membership{Epoch: 1}
	for i := range n {
		c := Member{ID: fmt.Sprintf("genomes-%d", i), Node: fmt.Sprintf("node-%d", i), Addr: fmt.Sprintf("10.0.0.%d:7000", i+1), State: Ready}
		if i < len(weights) {
			c.Weight = weights[i]
		}
		m.Members = append(m.Members, c)
	}
	return m
}

func object(seed uint64, size int64) Object {
	var id source.ID
	binary.LittleEndian.PutUint64(id[:], mix(seed))
	binary.LittleEndian.PutUint64(id[8:], mix(seed+1<<32))
	return Object{ID: id, Size: size}
}

func ids(members []Member) (out []string) {
	for _, c := range members {
		out = append(out, c.ID)
	}
	return out
}

// piece is what placement decides on at once: a whole object or a block of a striped one.
type piece struct {
	o     Object
	block int64
	bytes int64
}

// pieces is a dataset of small, middling and striped objects.
func pieces() (out []piece, total int64) {
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range uint64(20_000) {
		size := rng.Int64N(64 << 20)
		out = append(out, piece{object(i, size), 0, size})
		total += size
	}
	for i := range uint64(20) {
		o := object(1_000_000+i, StripeThreshold+1+rng.Int64N(4<<30))
		for b := range Blocks(o.Size) {
			n := min(BlockSize, o.Size-b*BlockSize)
			out = append(out, piece{o, b, n})
			total += n
		}
	}
	return out, total
}

// shares returns the part of the bytes that each member owns first.
func shares(m Membership, of []piece, total int64) map[string]float64 {
	out := map[string]float64{}
	for _, p := range of {
		out[m.Owners(p.o, p.block, 1)[0].ID] += float64(p.bytes) / float64(total)
	}
	return out
}

// moved returns the part of the bytes whose first owner differs, and fails unless each move has the
// changed member at the end where it must be: as the new owner (in), the old one (out), or either.
func moved(t *testing.T, before, after Membership, of []piece, total int64, in, out string) (part float64) {
	t.Helper()
	for _, p := range of {
		b, a := before.Owners(p.o, p.block, 1)[0].ID, after.Owners(p.o, p.block, 1)[0].ID
		if a == b {
			continue
		}
		if (in == "" || a != in) && (out == "" || b != out) {
			t.Fatalf("block %d of %x went from %s to %s, which have nothing to do with the change", p.block, p.o.ID, b, a)
		}
		part += float64(p.bytes) / float64(total)
	}
	return part
}

// near checks a part of the bytes against its expectation, with four standard deviations of what drawing
// an owner for each piece at random would give. Placement is fixed, so the outcome is the same every time.
func near(t *testing.T, what string, of []piece, got, want float64) {
	t.Helper()
	sum, squares := 0.0, 0.0
	for _, p := range of {
		sum += float64(p.bytes)
		squares += float64(p.bytes) * float64(p.bytes)
	}
	if tolerance := 4 * math.Sqrt(want*(1-want)*squares) / sum; math.Abs(got-want) > tolerance {
		t.Errorf("%s: %.4f of the bytes, want %.4f ± %.4f", what, got, want, tolerance)
	}
}

func TestSharesFollowWeights(t *testing.T) {
	of, total := pieces()
	for _, weights := range [][]uint32{{1, 1, 1, 1, 1, 1, 1}, {1, 2, 3, 4}, {12 << 20, 24 << 20, 3 << 20}, {0, 1, 2}, {1 << 31, 1 << 31, math.MaxUint32}} {
		m := workers(len(weights), weights...)
		sum := 0.0
		for _, w := range weights {
			sum += float64(max(w, 1))
		}
		got := shares(m, of, total)
		for i, w := range weights {
			near(t, fmt.Sprintf("weights %v: member %d", weights, i), of, got[m.Members[i].ID], float64(max(w, 1))/sum)
		}
	}
}

func TestAddingOrRemovingAWorkerMovesItsShareOnly(t *testing.T) {
	of, total := pieces()
	for _, weights := range [][]uint32{make([]uint32, 2), make([]uint32, 5), make([]uint32, 16), {1, 2, 3, 4}, {5, 1, 1, 1, 8}} {
		all := workers(len(weights), weights...)
		last := len(weights) - 1
		fewer := Membership{Epoch: 2, Members: all.Members[:last]}
		sum := 0.0
		for _, w := range weights {
			sum += float64(max(w, 1))
		}
		want := float64(max(weights[last], 1)) / sum
		near(t, fmt.Sprintf("adding to %v", weights), of, moved(t, fewer, all, of, total, all.Members[last].ID, ""), want)
		near(t, fmt.Sprintf("removing from %v", weights), of, moved(t, all, fewer, of, total, "", all.Members[last].ID), want)

		// A member that leaves is, for placement, gone.
		leaving := Membership{Epoch: 3, Members: slices.Clone(all.Members)}
		leaving.Members[last].State = Leaving
		if part := moved(t, fewer, leaving, of, total, "", ""); part != 0 {
			t.Errorf("leaving and gone differ by %.4f of the bytes", part)
		}
	}
}

func TestChangingAWeightMovesBytesOnlyFromOrToThatWorker(t *testing.T) {
	of, total := pieces()
	before, after := workers(4, 2, 2, 2, 2), workers(4, 2, 2, 2, 4)
	near(t, "doubling a weight", of, moved(t, before, after, of, total, "genomes-3", ""), 4.0/10-2.0/8)
	near(t, "halving a weight", of, moved(t, after, before, of, total, "", "genomes-3"), 4.0/10-2.0/8)
}

func TestALostCopyIsReplacedAndTheOthersStay(t *testing.T) {
	m := workers(6, 1, 2, 3, 1, 2, 3)
	for i := range uint64(2000) {
		o := object(i, 1)
		all := ids(m.Owners(o, 0, 0))
		for _, gone := range []int{0, 1, 2, 5} {
			fewer := Membership{}
			for _, c := range m.Members {
				if c.ID != all[gone] {
					fewer.Members = append(fewer.Members, c)
				}
			}
			want := slices.Delete(slices.Clone(all), gone, gone+1)
			if got := ids(fewer.Owners(o, 0, 0)); !slices.Equal(got, want) {
				t.Fatalf("object %d without %s: %v, want %v", i, all[gone], got, want)
			}
		}
	}
}

func TestOrderIsOneForEveryPermutationAndLength(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	m := workers(9, 1, 1, 5, 2)
	for i := range m.Members {
		m.Members[i].Node = fmt.Sprintf("node-%d", i/2)
	}
	m.Members[8].Node = ""
	for i := range uint64(500) {
		o := object(i, int64(i)<<24)
		want := ids(m.Owners(o, int64(i), 0))
		p := Membership{Epoch: i, Members: slices.Clone(m.Members)}
		rng.Shuffle(len(p.Members), func(i, j int) { p.Members[i], p.Members[j] = p.Members[j], p.Members[i] })
		for j := range p.Members { // what does not take part in placement
			p.Members[j].Addr, p.Members[j].Socket = fmt.Sprint(rng.Uint64()), "elsewhere"
		}
		for n := range len(want) + 3 {
			got := ids(p.Owners(o, int64(i), n))
			if k := min(n, len(want)); n > 0 && !slices.Equal(got, want[:k]) || n == 0 && !slices.Equal(got, want) {
				t.Fatalf("object %d, first %d: %v of %v", i, n, got, want)
			}
		}
	}
}

func TestCopiesAreOnDistinctWorkersAndNodes(t *testing.T) {
	m := workers(12)
	for i := range m.Members {
		m.Members[i].Node = fmt.Sprintf("node-%d", i%4) // three workers on each of four nodes
	}
	m.Members[11].State = Leaving
	for i := range uint64(2000) {
		all := m.Owners(object(i, 5), 0, -1)
		if len(all) != 11 {
			t.Fatalf("%d owners of 11 that are ready", len(all))
		}
		seen, nodes := map[string]bool{}, map[string]bool{}
		for k, c := range all {
			if seen[c.ID] || c.State != Ready {
				t.Fatalf("object %d: %s twice or not ready, in %v", i, c.ID, ids(all))
			}
			seen[c.ID] = true
			if k < 4 && nodes[c.Node] {
				t.Fatalf("object %d: copy %d is on %s again, though there are four nodes", i, k, c.Node)
			}
			nodes[c.Node] = true
		}
	}
	// Without nodes the order is the plain one.
	plain := workers(5)
	bare := workers(5)
	for i := range bare.Members {
		bare.Members[i].Node = ""
	}
	for i := range uint64(100) {
		if a, b := ids(plain.Owners(object(i, 1), 0, 0)), ids(bare.Owners(object(i, 1), 0, 0)); !slices.Equal(a, b) {
			t.Fatalf("with a node each %v, without any %v", a, b)
		}
	}
}

func TestWholeUpToThresholdAndStripedAbove(t *testing.T) {
	m := workers(8)
	for i := range uint64(50) {
		whole := object(i, StripeThreshold)
		first := m.Owners(whole, 0, 1)[0].ID
		for b := range Blocks(whole.Size) {
			if got := m.Owners(whole, b, 1)[0].ID; got != first {
				t.Fatalf("block %d of an object of the threshold's size is on %s, block 0 on %s", b, got, first)
			}
		}
	}
	striped := object(7, StripeThreshold+1)
	count := map[string]int{}
	for b := range Blocks(striped.Size) {
		count[m.Owners(striped, b, 1)[0].ID]++
	}
	for _, c := range m.Members {
		if n := count[c.ID]; n < 257/8/2 || n > 257/8*2 {
			t.Errorf("%s has %d of 257 blocks", c.ID, n)
		}
	}
}

func TestNobodyReady(t *testing.T) {
	leaving := workers(2)
	for i := range leaving.Members {
		leaving.Members[i].State = Leaving
	}
	for _, m := range []Membership{{}, leaving} {
		if got := m.Owners(object(1, 1), 0, 1); len(got) != 0 {
			t.Errorf("owners %v", got)
		}
		if got := m.Owners(object(1, 1), 0, 0); len(got) != 0 {
			t.Errorf("owners %v", got)
		}
		if c, ok := m.Lister("genomes"); ok {
			t.Errorf("lister %v", c)
		}
	}
}

func TestListerIsReadyStableAndSpread(t *testing.T) {
	m := workers(5, 1, 100)
	m.Members[2].State = Leaving
	count := map[string]int{}
	for i := range 1000 {
		name := fmt.Sprintf("argo/dataset-%d", i)
		c, ok := m.Lister(name)
		if !ok || c.State != Ready {
			t.Fatalf("%s: %v, %v", name, c, ok)
		}
		count[c.ID]++
		reversed := Membership{Members: slices.Clone(m.Members)}
		slices.Reverse(reversed.Members)
		if r, _ := reversed.Lister(name); r.ID != c.ID {
			t.Fatalf("%s: %s or %s, by the order of the list", name, c.ID, r.ID)
		}
	}
	for _, c := range m.Members {
		if n := count[c.ID]; (c.State == Ready) != (n > 150) {
			t.Errorf("%s (%s) lists %d of 1000 datasets", c.ID, c.State, n)
		}
	}
}

// Placement is a contract between versions and platforms: if this changes, an upgrade of a running tier
// moves every byte, and two architectures disagree on owners.
func TestPlacementIsFixed(t *testing.T) {
	m := workers(10, 1, 2, 3)
	var got strings.Builder
	for i := range uint64(40) {
		size := int64(1)
		if i >= 20 {
			size = 2 << 30
		}
		fmt.Fprint(&got, m.Owners(object(i, size), int64(i), 1)[0].ID[len("genomes-"):])
	}
	const want = "2032192010251225821397324063111319564852"
	if got.String() != want {
		t.Errorf("owners of the fixed objects are %s, were %s", got.String(), want)
	}
}

func TestNegLog2(t *testing.T) {
	check := func(h uint64) {
		t.Helper()
		u := (float64(h) + 1) / (1 << 64)
		got, want := float64(negLog2(h))/(1<<logFraction), -math.Log2(u)
		if h < 1<<63+1<<62 && math.Abs(got-want) > 1e-6 { // above, u itself has no such precision in a float
			t.Errorf("-log2 of %x: %v, want %v", h, got, want)
		}
	}
	last := negLog2(0)
	if last != 64<<logFraction || negLog2(math.MaxUint64) != 0 {
		t.Errorf("ends are %x and %x", last, negLog2(math.MaxUint64))
	}
	rng := rand.New(rand.NewPCG(5, 6))
	hs := []uint64{0, 1, 2, 1<<32 - 1, 1 << 32, 1<<63 - 2, 1<<63 - 1, 1 << 63, 1<<64 - 1<<53, math.MaxUint64 - 1, math.MaxUint64}
	for range 20_000 {
		hs = append(hs, rng.Uint64()>>rng.UintN(64))
	}
	for k := range uint64(1 << logBits) { // around every step of the table
		h := 1<<63 | k<<(63-logBits)
		hs = append(hs, h-1, h, h+1)
	}
	slices.Sort(hs)
	for _, h := range hs {
		check(h)
		if c := negLog2(h); c > last {
			t.Fatalf("not monotone at %x", h)
		} else {
			last = c
		}
	}
}

func TestBlocks(t *testing.T) {
	for size, want := range map[int64]int64{-1: 0, 0: 0, 1: 1, BlockSize - 1: 1, BlockSize: 1, BlockSize + 1: 2, math.MaxInt64: 1 << 41} {
		if got := Blocks(size); got != want {
			t.Errorf("%d bytes: %d blocks, want %d", size, got, want)
		}
	}
}

func TestOwnersAllocatesOnlyItsResult(t *testing.T) {
	m := workers(20)
	o := object(1, 1)
	for _, n := range []int{1, 2, 0} {
		if allocs := testing.AllocsPerRun(100, func() { m.Owners(o, 3, n) }); allocs > 1 {
			t.Errorf("first %d owners: %v allocations", n, allocs)
		}
	}
}

func BenchmarkOwners(b *testing.B) {
	for _, members := range []int{3, 10, 100} {
		m := workers(members)
		for _, n := range []int{1, 3} {
			b.Run(fmt.Sprintf("members=%d/n=%d", members, n), func(b *testing.B) {
				b.ReportAllocs()
				for i := range b.N {
					m.Owners(object(uint64(i), 2<<30), int64(i), n)
				}
			})
		}
	}
}

func TestNameOwners(t *testing.T) {
	var m Membership
	for i := range 10 {
		m.Members = append(m.Members, Member{ID: fmt.Sprintf("w-%d", i), Addr: "a:1", Node: fmt.Sprintf("n-%d", i/2), State: Ready})
	}
	count := map[string]int{}
	moved := 0
	less := Membership{Members: m.Members[:9]}
	for i := range 10000 {
		key := fmt.Sprintf("out/%d", i)
		o := m.NameOwners("ns/d", key, 3)
		if len(o) != 3 || o[0].Node == o[1].Node || o[1].Node == o[2].Node || o[0].Node == o[2].Node {
			t.Fatalf("%s: %v are not three members on three nodes", key, o)
		}
		if one := m.NameOwners("ns/d", key, 1); len(one) != 1 || one[0].ID != o[0].ID {
			t.Fatalf("%s: first of one %v, of three %v", key, one, o)
		}
		count[o[0].ID]++
		if now := less.NameOwners("ns/d", key, 1)[0]; now.ID != o[0].ID {
			moved++
			if o[0].ID != "w-9" {
				t.Fatalf("%s moved from %s, which stayed", key, o[0].ID)
			}
		}
	}
	for id, n := range count {
		if n < 800 || n > 1200 {
			t.Errorf("%s owns %d of 10000 names", id, n)
		}
	}
	if moved != count["w-9"] {
		t.Errorf("%d names moved, %d were the lost member's", moved, count["w-9"])
	}
	if o := (Membership{}).NameOwners("ns/d", "k", 2); len(o) != 0 {
		t.Errorf("nobody: %v", o)
	}
	a, b := 0, 0
	for i := range 1000 {
		key := fmt.Sprint(i)
		if m.NameOwners("ns/d", key, 1)[0].ID == m.NameOwners("ns/e", key, 1)[0].ID {
			a++
		}
		b++
	}
	if a > b/4 {
		t.Errorf("two datasets place %d of %d names alike", a, b)
	}
}
