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
// The owner remembers the version of a name that it has seen, or that there is none (which is a version like any
// other in what follows), for Fresh (1 s), or for FreshExclusive (30 s) where nobody else writes to the bucket, and
// asks the bucket again after that. A put goes to the bucket
// and, from the same stream, into the store under an ID of its own; once the bucket has told the version
// the blocks get its ID (store.Rename). Memory is bounded: a put holds its parts under way, a read a block.
// An upload in parts is the bucket's own, with the bucket's ETags: it outlives every worker. Workers keep the
// bytes of the parts that go through them while there is room, so that the object is not fetched back
// (parts.go). A listing is the bucket's.
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
// # Writing back
//
// With Config.Back a put of up to MaxBack is acknowledged once Copies workers on distinct nodes hold it in their
// journals (package journal), which outlive their processes: the owner and the next of the name's order. The owner
// brings it to the bucket at once, one version of a name after the other and several names at a time, again and again
// while that fails, and then has the copies dropped. A put has a sequence, which grows along the owners of a name.
//
// Everything else goes through: larger objects and uploads in parts, which are on their way to the bucket while they
// come; deletes, copies and conditional puts, which the bucket decides. Such a write of a name waits until what is
// pending of it is in the bucket and until no copy of that can come back over it. That is fewer kinds of entries, and
// one place that decides conditions, for the price of the bucket's time. A put goes through as well while too few
// workers can be reached, the journal is full, the bucket lags behind by more than MaxAge, or it is not known yet which
// ETag the bucket will give (see tags). When that turns out only after a put was read, it is acknowledged when it is in
// the bucket. So nothing is ever acknowledged with fewer copies, and what the bucket says is what a client is told.
//
// What the bucket refuses for good stays pending, and the status says why. It does not count as lagging once the bucket
// has taken what was put later, and no write waits for it that takes its place, which has no conditions. Such a write may
// fail too. So what it takes the place of stays pending until the bucket has the write (or, of a delete, says that it has
// nothing of that name); nothing of the name is brought there meanwhile. Then it is dropped as if the bucket had it, in
// the same way and while the same is sure, before the write is acknowledged.
//
// What is pending overrides the bucket: for its owner's reads, which are by its own state of the name, and for
// listings. Those ask the members before the bucket, and go by what each one knows to be pending of its own names: what
// it does not tell then is in the bucket, or somebody has put it since. Of the names of an owner that cannot be reached,
// or does not know yet, what all the members hold is taken (see askOnce), by reads too.
//
// Why nothing that was acknowledged is lost, and no name has two truths. A worker serves a name only while it is sure
// (epochs.sure): it owns it under a settled list, or by every list since that, none of which it missed. To settle a
// list, here, takes that every member of it, and of the lists before, tells after it follows it what it holds of this
// worker's names (or stopped with nothing left). Up to Copies-1 of them need not: they refuse connections, or gave no
// answer for HandOverTime, or for hungAfter where they said before that they stop with nothing left. (One that was
// leaving as it said that does not count: nobody gives it a copy.) Since Copies hold what was acknowledged, one that was
// heard does. They do not tell at one instant: who told of an entry is asked again once all have told, and what nobody
// holds any more then is in the bucket, with all before it. A worker that comes without the memory of a former life is
// itself one of those that were not heard; with more missing, nobody serves the names that moved until they are back,
// since to go on could lose them. An owner acknowledges a put only if it is still sure, under the epoch by which the
// copies were taken, after they were: holders refuse another epoch's, and look again after they took one, so what they
// told a new owner has all that an old one will acknowledge. Names that do not move are served all along; those of a
// worker that hangs wait until the membership is without it, and are read meanwhile by asking the others and then the
// bucket.
//
// Why an owner that is cut off does no harm. To be sure also takes that within hungAfter (15 s) this worker looked at
// its membership, and Copies-1 others told that they follow no newer one (standing.confirm). A new owner has heard one
// of those: it settled without at most Copies-1, this one among them. And it waits, where one does not answer, for
// HandOverTime unless that one said that it stops, and for hungAfter since the last of the others told it that they
// follow the new list. So by then an old owner serves nothing, and begins to bring nothing to the bucket; what it is
// bringing there it gives up. That is looked at right before the content is sent, and the bucket is told which version
// it is to take the place of, or that there must be none: a request that comes after another owner's changes nothing.
// What remains possible: a request that the old owner had begun, which it, the network or the bucket held up until a
// new owner had settled, and which comes to a bucket that does not know the condition (OSS over what is there, and with
// versioning over nothing as well; stores that answer that they do not take it), or that has by then what it had
// before: the same bytes put again, or nothing, since it was deleted. The same holds of writes that go through, whose
// requests have no condition unless the client gave one. Members that nothing listens for, at the addresses they are
// known by, need not confirm: a worker whose every connection to its peers is refused, though they are there, would go
// on. And a worker that takes the place of one with its id, as a pod that was deleted by force while its node was cut
// off, does not wait for that one. With
// two workers, one that hangs takes the other's names along until the list is without it.
//
// Why no old copy comes back. A holder drops a copy when the owner says so, and one that cannot be told keeps it. Until
// all are told, the owner and those that could be told keep a mark, that everything up to a sequence is in the bucket,
// and a write goes through only when Copies workers, the owner included, have it: whoever asks later hears one of
// them. So it is for a holder that left the list as well, which others, that are not settled without it, may still ask:
// until the list is closed (standing). It is once every member of it is settled, holds what it knows to be pending or
// knows a member that does, and has its marks where they should be; then nobody asks those that left before. An owner
// counts on that when all have told that they know. A member that left the list and comes back (ring.Member.Joined)
// holds nothing that counts, nor does this worker itself then. A copy that was on its way when it was to be dropped is
// refused. A worker that did not look at its membership for hungAfter is not sure until it has asked everybody again.
//
// An owner that starts anew asks the bucket first whether it has the newest version already. Where others write to the
// bucket as well, the last to arrive there wins, as ever; that is when it is brought there, not when it was put. A copy
// whose bytes have changed is found by its sums and taken from another holder. A worker that is stopped refuses writes
// and ends once it holds nothing any more, for bounded time; past that, the others have it. One that is out of the list
// holds nothing any more once the bucket has what it held, or enough members do.
//
// # Rules
//
// Concurrency: Names is safe for concurrent use. Its goroutines belong to Run, which returns after the last
// of them, and to the calls that began them. No lock is held over I/O. Failure: errors wrap those of
// packages source and gateway. A put that fails leaves nothing visible, nothing staged and no parts: those
// that it cannot remove, since the bucket is away or denies it, are removed once it lets us. Parts of a put that the
// death of the process cut off are removed by the next one in the same folder, which finds their names in a journal.
// Where the folder is lost too, or the process died while the bucket told it the name (of an upload without parts
// then), or the bucket refuses for good to remove them, the bucket's own rule for unfinished uploads must; in an
// exclusive dataset a worker aborts every upload older than UploadAge.
//
// It may import cache/objects/journal, cache/gateway (the contract), cache/checksum, cache/ring, cache/source,
// cache/store and cache/wire.
package objects
