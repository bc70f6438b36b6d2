package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync/atomic"

	"github.com/stepcache/stepcache/cache/checksum"
	"github.com/stepcache/stepcache/cache/source"
)

// The journal says which blocks the files hold and their sums, so that a new process finds them again. It
// is only a hint: recovery believes the bytes, so a lost record costs a fetch and a stale one a checksum.
// Records are collected in memory in the order of the changes and written by one goroutine; when more than
// half of the file is garbage it is written anew and renamed into place.

const (
	journalName  = "journal"
	journalTemp  = "journal.new"
	journalMagic = "stepcache journal 2\n"
	// journalSlack is the garbage that is never worth a rewrite.
	journalSlack = 16 << 10
	// A record is: CRC32C of the rest, kind, length of the payload, payload.
	recordHead = 4 + 1 + 2
)

// Kinds of records.
const (
	recordAdd  = 1 // id, object size, block, sums
	recordDel  = 2 // id, block
	recordGone = 3 // id
)

// recordLen is the length of the record that adds a block of that many bytes.
func recordLen(size int) int64 {
	return int64(recordHead + 16 + 8 + 8 + checksum.EncodedSize*checksum.Count(size))
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

type journal struct {
	path string
	kick chan struct{} // there is something to write
	stop chan struct{}
	done chan struct{}

	pending []byte       // guarded by Store.mu
	bytes   atomic.Int64 // length of the file, for who does not write it

	// Of the writing goroutine alone.
	f      *os.File
	size   int64
	broken bool // the file no longer says what is held: it must be written anew
	skip   int  // flushes to let pass before trying that
}

func appendRecord(p []byte, kind byte, payload ...[]byte) []byte {
	start := len(p)
	p = append(p, 0, 0, 0, 0, kind, 0, 0)
	for _, b := range payload {
		p = append(p, b...)
	}
	binary.LittleEndian.PutUint16(p[start+5:], uint16(len(p)-start-recordHead))
	binary.LittleEndian.PutUint32(p[start:], crc32.Checksum(p[start+4:], castagnoli))
	return p
}

func appendAdd(p []byte, b *block) []byte {
	var fixed [32]byte
	copy(fixed[:], b.obj.id[:])
	binary.LittleEndian.PutUint64(fixed[16:], uint64(b.obj.size))
	binary.LittleEndian.PutUint64(fixed[24:], uint64(b.n))
	return appendRecord(p, recordAdd, fixed[:], checksum.Encode(nil, b.sums))
}

func (j *journal) append(p []byte) {
	j.pending = p
	select {
	case j.kick <- struct{}{}:
	default:
	}
}

// add notes that b is resident. Store.mu is held, as for del and gone.
func (j *journal) add(b *block) { j.append(appendAdd(j.pending, b)) }

// del notes that one block is no longer there.
func (j *journal) del(b *block) {
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(b.n))
	j.append(appendRecord(j.pending, recordDel, b.obj.id[:], n[:]))
}

// gone notes that the file is no longer there.
func (j *journal) gone(o *object) { j.append(appendRecord(j.pending, recordGone, o.id[:])) }

// writeJournal is the goroutine that owns the journal's file.
func (s *Store) writeJournal() {
	j := s.journal
	defer close(j.done)
	for {
		select {
		case <-j.kick:
			if err := s.flushJournal(false); err != nil {
				s.log.Warn("store: cannot write the journal, a restart would fetch again what is held", "error", err)
			}
		case <-j.stop:
			return
		}
	}
}

// flushJournal writes what is pending. After a failure the file is written anew as a whole, but only now
// and then, or at last.
func (s *Store) flushJournal(last bool) error {
	j := s.journal
	s.mu.Lock()
	p, live := j.pending, s.live
	j.pending = nil
	s.mu.Unlock()
	if len(p) == 0 && !(j.broken && last) {
		return nil
	}
	if j.broken && j.skip > 0 && !last {
		j.skip--
		return nil
	}
	if j.broken || j.size+int64(len(p)) > 2*live+journalSlack {
		err := s.compactJournal()
		j.broken = err != nil
		j.skip = 1000
		return err
	}
	if _, err := j.f.WriteAt(p, j.size); err != nil {
		// Cut the torn record off, or nothing after it could be read.
		j.broken, j.skip = true, 1000
		return errors.Join(err, j.f.Truncate(j.size))
	}
	j.size += int64(len(p))
	j.bytes.Store(j.size)
	return nil
}

// compactJournal writes a new journal of what is resident.
func (s *Store) compactJournal() error {
	j := s.journal
	s.mu.Lock()
	p := make([]byte, 0, int64(len(journalMagic))+s.live)
	p = append(p, journalMagic...)
	for _, o := range s.objects {
		for _, b := range o.blocks {
			if b.state == resident {
				p = appendAdd(p, b)
			}
		}
	}
	j.pending = nil
	s.mu.Unlock()

	temp := s.file(journalTemp)
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = f.Write(p); err == nil {
		err = os.Rename(temp, j.path)
	}
	if err != nil {
		f.Close()
		return errors.Join(err, os.Remove(temp))
	}
	if j.f != nil {
		j.f.Close()
	}
	j.f, j.size = f, int64(len(p))
	j.bytes.Store(j.size)
	return nil
}

// close ends the writer after a last flush.
func (s *Store) closeJournal() error {
	j := s.journal
	close(j.stop)
	<-j.done
	err := s.flushJournal(true)
	if err != nil {
		err = fmt.Errorf("store %s: cannot write the journal, a restart would fetch again what is held: %w", s.dir, err)
	}
	return errors.Join(err, j.f.Close())
}

// found is an object as the journal has it.
type found struct {
	id   source.ID
	size int64
	sums map[int64][]uint64
}

// errOtherJournal: the journal is of another version, or none at all.
var errOtherJournal = errors.New("not a journal of this version")

// readJournal returns the objects of a journal in the order of their last record. It stops at the first
// record that is torn or damaged.
func readJournal(r io.Reader) ([]*found, error) {
	p, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	if len(p) == 0 {
		return nil, nil
	}
	if len(p) < len(journalMagic) || string(p[:len(journalMagic)]) != journalMagic {
		return nil, errOtherJournal
	}
	p = p[len(journalMagic):]
	objects := make(map[source.ID]*found)
	order := make(map[source.ID]int)
	for i := 0; len(p) >= recordHead; i++ {
		n := int(binary.LittleEndian.Uint16(p[5:]))
		if len(p) < recordHead+n || crc32.Checksum(p[4:recordHead+n], castagnoli) != binary.LittleEndian.Uint32(p) {
			break
		}
		kind, body := p[4], p[recordHead:recordHead+n]
		p = p[recordHead+n:]
		if len(body) < 16 {
			break
		}
		id := source.ID(body[:16])
		body = body[16:]
		switch {
		case kind == recordAdd && len(body) >= 16 && len(body)%checksum.EncodedSize == 0:
			size, block := int64(binary.LittleEndian.Uint64(body)), int64(binary.LittleEndian.Uint64(body[8:]))
			f := objects[id]
			if f == nil || f.size != size {
				f = &found{id: id, size: size, sums: make(map[int64][]uint64, 1)}
				objects[id] = f
			}
			f.sums[block] = checksum.Decode(body[16:])
			order[id] = i
		case kind == recordDel && len(body) == 8:
			if f := objects[id]; f != nil {
				delete(f.sums, int64(binary.LittleEndian.Uint64(body)))
			}
		case kind == recordGone && len(body) == 0:
			delete(objects, id)
		}
	}
	return sortFound(objects, order), nil
}
