package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ends are both ends of a connection: TCP, or packets over a Unix socket.
func ends(t *testing.T, network string) (client, server net.Conn) {
	t.Helper()
	addr := "127.0.0.1:0"
	if network == "unixpacket" {
		dir, err := os.MkdirTemp("/tmp", "w") // not below TMPDIR: a socket's path has 107 bytes at most
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		addr = filepath.Join(dir, "s")
	}
	l, err := net.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err = net.Dial(network, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestHandshake(t *testing.T) {
	keys := GenerateKeys()
	old := GenerateKeys()
	keys.Read = append(keys.Read, old.Read...) // a rotation is under way
	for _, network := range []string{"tcp", "unixpacket"} {
		for _, c := range []struct {
			name    string
			dataset string
			role    Role
			key     Key
			ok      bool
		}{
			{"new key", "ns/d", RoleRead, keys.Read[0], true},
			{"old key", "ns/d", RoleRead, old.Read[0], true},
			{"control", "ns/d", RoleControl, keys.Control[0], true},
			{"wrong key", "ns/d", RoleRead, GenerateKeys().Read[0], false},
			{"read key for control", "ns/d", RoleControl, keys.Read[0], false},
			{"unknown role", "ns/d", 9, keys.Read[0], false},
			{"other dataset", "ns/e", RoleRead, keys.Read[0], false},
		} {
			t.Run(network+"/"+c.name, func(t *testing.T) {
				client, server := ends(t, network)
				errs := make(chan error, 1)
				var role Role
				go func() {
					var err error
					role, _, err = ServerHandshake(server, "ns/d", keys)
					errs <- err
				}()
				cerr := ClientHandshake(context.Background(), client, c.dataset, c.role, c.key)
				serr := <-errs
				if c.ok {
					if cerr != nil || serr != nil || role != c.role {
						t.Fatalf("client %v, server %v, role %v", cerr, serr, role)
					}
					// The deadlines of the handshake are gone, and both ends agree where it ended.
					go client.Write([]byte("x"))
					b := make([]byte, 8)
					if n, err := server.Read(b); err != nil || string(b[:n]) != "x" {
						t.Fatalf("after the handshake: %q, %v", b[:n], err)
					}
					return
				}
				if !errors.Is(cerr, ErrUnauthorized) || !errors.Is(serr, ErrUnauthorized) || role != 0 {
					t.Fatalf("client %v, server %v, role %v", cerr, serr, role)
				}
			})
		}
	}
}

// TestHandshakeProvesTheServer lets a stranger without the key answer.
func TestHandshakeProvesTheServer(t *testing.T) {
	client, server := ends(t, "tcp")
	go func() {
		io.ReadFull(server, make([]byte, helloSize))
		server.Write(append([]byte{verdictOK}, make([]byte, 64)...))
	}()
	if err := ClientHandshake(context.Background(), client, "d", RoleRead, GenerateKeys().Read[0]); !errors.Is(err, ErrUnauthorized) {
		t.Fatalf("a stranger was believed: %v", err)
	}
}

// TestHandshakeRefusesReflection plays the server's own proof, and an earlier client's, back to it.
func TestHandshakeRefusesReflection(t *testing.T) {
	keys := GenerateKeys()
	recorded := make(chan []byte, 1)
	for _, which := range []string{"server's proof", "replayed hello and answer"} {
		client, server := ends(t, "tcp")
		errs := make(chan error, 1)
		go func() {
			_, _, err := ServerHandshake(server, "d", keys)
			errs <- err
		}()
		if which == "server's proof" {
			hello := append([]byte("SCh2"), byte(RoleRead))
			id := keys.Read[0].ID()
			hello = append(hello, id[:]...)
			name := append([]byte(nil), sha("d")...)
			hello = append(append(hello, name...), make([]byte, 32)...)
			client.Write(hello)
			challenge := make([]byte, challengeSize)
			if _, err := io.ReadFull(client, challenge); err != nil {
				t.Fatal(err)
			}
			client.Write(challenge[33:])
			if err := <-errs; !errors.Is(err, ErrUnauthorized) {
				t.Fatalf("%s: %v", which, err)
			}
			recorded <- append(hello, proof(keys.Read[0], "client", hello, challenge[1:33])...)
			continue
		}
		client.Write(<-recorded)
		if err := <-errs; !errors.Is(err, ErrUnauthorized) {
			t.Fatalf("%s: %v", which, err)
		}
	}
}

func TestHandshakeGarbage(t *testing.T) {
	for name, garbage := range map[string][]byte{
		"http": []byte("GET / HTTP/1.1\r\nHost: worker\r\nUser-Agent: something that is long enough to be a hello\r\n\r\n"),
		"zero": make([]byte, 1<<16),
		"cut":  []byte("SCh2"),
	} {
		client, server := ends(t, "tcp")
		go func() {
			client.Write(garbage)
			client.(*net.TCPConn).CloseWrite()
		}()
		if _, _, err := ServerHandshake(server, "d", GenerateKeys()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestHandshakeWithAnotherVersion: a worker refuses what it does not speak, and the reader is told why.
func TestHandshakeWithAnotherVersion(t *testing.T) {
	client, between := ends(t, "tcp")
	there, server := ends(t, "tcp")
	refused := make(chan error, 1)
	go func() {
		_, _, err := ServerHandshake(server, "d", GenerateKeys())
		server.Close()
		refused <- err
	}()
	go func() { // makes the hello one of the version before
		defer between.Close()
		hello := make([]byte, helloSize)
		if _, err := io.ReadFull(between, hello); err != nil {
			return
		}
		if _, err := there.Write(append([]byte("SCh1"), hello[4:]...)); err == nil {
			io.Copy(between, there)
		}
	}()
	tries := 0
	_, err := Connect(t.Context(), func(context.Context) (net.Conn, error) { tries++; return client, nil }, "d", RoleRead, Keys{Read: make([]Key, 2)}, nil)
	if !errors.Is(err, ErrVersion) || errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "the same release on both sides") {
		t.Errorf("the reader is told %v", err)
	}
	if tries != 1 {
		t.Errorf("%d keys were tried", tries)
	}
	if err := <-refused; !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "another version") {
		t.Errorf("the worker: %v", err)
	}
}

func TestClientHandshakeEndsWithItsContext(t *testing.T) {
	client, _ := ends(t, "tcp") // nobody answers
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := ClientHandshake(ctx, client, "d", RoleRead, Key{}); err == nil {
		t.Fatal("no error")
	}
}

func FuzzServerHandshake(f *testing.F) {
	keys := GenerateKeys()
	f.Add([]byte("SCh2"))
	f.Add(bytes.Repeat([]byte{0xff}, helloSize+answerSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &script{in: bytes.NewReader(b)}
		if _, _, err := ServerHandshake(c, "d", keys); err == nil {
			t.Fatal("accepted")
		}
		if c.out > challengeSize+welcomeSize {
			t.Fatalf("%d bytes answered to a stranger", c.out)
		}
	})
}

// script is a connection whose peer sends fixed bytes.
type script struct {
	in  io.Reader
	out int
}

func (s *script) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s *script) Write(p []byte) (int, error)      { s.out += len(p); return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }
