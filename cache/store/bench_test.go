package store

import (
	"context"
	"fmt"
	"testing"

	"github.com/stepcache/stepcache/cache/ring"
)

func BenchmarkInsert(b *testing.B) {
	for _, size := range []int64{16 << 10, 256 << 10, ring.BlockSize} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s := open(b, Options{Dir: ownTmpfs(b, 512*mib), Quota: 512 * mib})
			fill := func(context.Context, []byte) error { return nil }
			b.SetBytes(size)
			i := 0
			for b.Loop() {
				// The second time over the same objects the policy would refuse none: drop instead.
				o := anObject(i, size)
				i++
				bl, err := s.Acquire(context.Background(), o, 0, fill)
				if err != nil {
					b.Fatal(err)
				}
				bl.Release()
				if int64(i)*size > 256*mib {
					for j := range i {
						s.Drop(anObject(j, size))
					}
					i = 0
				}
			}
		})
	}
}

func BenchmarkRead(b *testing.B) {
	for _, size := range []int64{16 << 10, 256 << 10, ring.BlockSize} {
		b.Run(fmt.Sprintf("%dKiB", size>>10), func(b *testing.B) {
			s := open(b, Options{Dir: ownTmpfs(b, 256*mib), Quota: 256 * mib})
			const n = 32
			var objects []ring.Object
			for i := range n {
				objects = append(objects, anObject(i, size))
				acquire(b, s, objects[i], 0).Release()
			}
			b.SetBytes(size)
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, size)
				for i := 0; pb.Next(); i++ {
					bl, ok := s.Lookup(objects[i%n], 0)
					if !ok {
						b.Error("not resident")
						return
					}
					if _, err := bl.ReadAt(p, 0); err != nil {
						b.Error(err)
					}
					bl.Release()
				}
			})
		})
	}
}
