// Package worker is the server of the cache tier: it fetches the blocks it owns from the bucket once,
// keeps them in memory, and serves them to clients and to other workers.
//
// # The model
//
// A Worker has a store of blocks (cache/store), the dataset's snapshots (cache/catalog), the list of
// workers (cache/ring) and one source a mount (cache/source). Three endpoints look at them: the block
// protocol over TCP, a Unix socket that hands out descriptors of whole files, and HTTP for control,
// health and metrics. Behind them work loops: the membership file and the current snapshot are kept
// up to date, whole objects are compared with the bucket's digests, memory is scrubbed, what was found
// corrupt is fetched again, and each load pulls what this worker owns.
//
// # Rules
//
// Concurrency: a Worker is safe for concurrent use. Every goroutine belongs to Serve, which returns only
// after the last of them. A block is fetched once however many ask (the store's single flight); a worker
// that fills a copy asks the earlier owners, who never ask back (wire.FlagPeer).
//
// Failure: whatever a peer or a reader sends, the worker answers with a status or closes that one
// connection. What keeps it from serving (no credentials, no bucket) is told in Status and by /readyz,
// tried again with backoff, and recovers by itself. It never answers bytes of another object version.
//
// With Config.Gateway it also accepts writes, and lists nothing: it composes the S3 endpoint (cache/gateway) with the
// dataset's names (cache/objects), whose workers reach each other over connections of the block protocol's port; so do readers
// that follow the names, which are mounts (names.go).
//
// It may import the other folders of cache but cache/client and cache/mount.
package worker
