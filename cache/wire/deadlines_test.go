package wire

import "testing"

// Whoever waits for another waits longer than the other may take, so that the one who knows why says so.
func TestDeadlinesNest(t *testing.T) {
	if SourceTimeout >= WorkerTimeout {
		t.Errorf("a worker gives up (%v) before its bucket (%v)", WorkerTimeout, SourceTimeout)
	}
	// Two workers in a row, each with all its time.
	if 2*WorkerTimeout >= ClientTimeout {
		t.Errorf("a client gives up (%v) before a second worker (%v) had its time", ClientTimeout, WorkerTimeout)
	}
	if ClientTimeout >= FUSETimeout {
		t.Errorf("the file system gives up (%v) before its client (%v)", FUSETimeout, ClientTimeout)
	}
	// A hung worker is found out, also at the dial, while there is time for the next.
	if PingInterval+PongTimeout+2*DialTimeout >= WorkerTimeout {
		t.Errorf("a hung worker is found out only after %v and %v", PingInterval, PongTimeout)
	}
}
