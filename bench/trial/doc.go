// Package trial reads one dataset in the ways that steps do, through this project and through what its users would
// take instead, and says how fast each was.
//
// It owns the contenders (a native folder, the bucket by a parallel client, this project, and the mounts of other
// projects that are on the PATH), the sections of rows that are measured of each, the readers (processes, so that
// what they take of the CPU can be told, and so that one that hangs can be killed), and the result as table and
// JSON. Samples are interleaved: every round runs all contenders one after the other, in another order each time.
//
// Concurrency: one goroutine measures. Failure: what a contender cannot do is told in its place, and the others
// go on: every reading has a limit and a deadline, and a mount that answers no more is aborted, unmounted lazily
// and its process killed. Wrong bytes are a failure of the contender, and of the whole run where it is our own.
//
// It may import bench/access, bench/host, cache/mount/mountinfo, local, local/process and tier.
package trial
