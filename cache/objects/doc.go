// Package objects is what one worker knows of the names of a writable dataset: which version a name has,
// and how puts, deletes, copies, uploads in parts and listings reach the bucket through the tier.
//
// # The model
//
// A name is a key of the dataset. Its owner is the first of the rendezvous order of (dataset, key) among
// the Ready members of one membership list (ring.NameOwners). Any worker serves any name: one that is not
// its owner passes the operation on to the owner, over a connection that is authenticated with the
// dataset's write key (wire.OpObjects), once: what was passed on is executed where it arrives. The sender's
// epoch travels along. A receiver with a newer list refuses it, one with an older list reads its own again
// and waits a moment; the sender then looks again who the owner is.
//
// The bucket is the truth. A version is what the bucket says (size, ETag, time, attributes); its bytes are
// blocks of the store under the ID of that version, never of the name, so that two versions cannot mix.
// The owner remembers the version of a name that it has seen for Fresh (1 s), or for FreshExclusive (30 s)
// where nobody else writes to the bucket, and asks the bucket again after that. A put goes to the bucket
// and, from the same stream, into the store under an ID of its own; once the bucket has told the version
// the blocks get its ID (store.Rename). Memory is bounded: a put holds its parts under way, a read a block.
// An upload in parts is the bucket's own, with the bucket's ETags: it outlives every worker. A listing is
// the bucket's.
//
// # Why reads see every acknowledged write
//
// The bucket is taken to be linearizable for each key and for listings, as S3 and OSS are. So a read that
// asks the bucket sees every write that was acknowledged before it began, and so does a listing. What is
// left to show is that a remembered version is never older than a write that was acknowledged before the
// read began. A remembered version has a time, at: when the request that told it was begun (for a put:
// when its last byte was read, which is before the bucket could commit it). It is used by a read that
// begins before at+Fresh, and only by a worker that owns the name under a membership that is settled: every
// other member of it, and of the lists before it that were not settled, has told this worker that it
// follows the same epoch (or is gone: nothing listens at its address, or HandOverTime has passed).
//
// A write executed by worker E, committed by the bucket at C, is acknowledged after one of:
//
//   - E owned the name, under one settled membership, from before C until the acknowledgement. Then E is the
//     only worker that uses remembered versions of the name in that time: at the same epoch there is no
//     other owner; at an older one nobody is, since all have told E; and nobody is settled at a newer one,
//     because E has not told that it follows it. E forgets the version before the write begins, remembers
//     none that a request told which the write overlapped, and lets no read join a request to the bucket
//     that was begun before.
//   - Otherwise, when Fresh has passed since C: whatever anybody remembered from before C is too old by
//     then to be used.
//
// That is all that is promised: while a write is not acknowledged yet, one reader may see it and a later
// one at another worker still what was before.
//
// So a name whose owner cannot be reached is served all the same: reads ask the bucket, writes go to it
// from the worker that was asked and wait out Fresh. That an owner hangs is found by a ping within
// PingInterval and PongTimeout of package wire (4 s), after which nobody waits for it for downFor (5 s):
// that is what one hung worker costs, and only for its own names. A worker that goes on after it hung does
// nothing of what it finds in its connections, of clients and of other workers, from senders that gave up
// (sender.go), as others have done it since; what it had already asked of the bucket may still happen. The one assumption about time is
// HandOverTime: a worker that can be reached by clients but by no other worker follows a membership that
// is replaced no longer than that.
//
// # Rules
//
// Concurrency: Names is safe for concurrent use. Its goroutines belong to Run, which returns after the last
// of them, and to the calls that began them. No lock is held over I/O. Failure: errors wrap those of
// packages source and gateway. A put that fails leaves nothing visible, nothing staged and no parts; parts
// of a put that the death of the process cut off are removed by the next one in the same folder, which
// finds their names in a journal. Where the folder is lost too, the bucket's own rule for unfinished
// uploads must remove them; in an exclusive dataset a worker aborts every upload older than UploadAge.
//
// It may import cache/gateway (the contract), cache/ring, cache/source, cache/store and cache/wire.
package objects
