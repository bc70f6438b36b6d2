package wire

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// The handshake, four messages of fixed size, so that it is the same over TCP and over packets, and so
// that nothing is allocated for a peer that has not proved itself:
//
//	hello      client to server: magic, role, key id, SHA-256 of the dataset's name, client nonce
//	challenge  server to client: verdict, server nonce, server proof
//	answer     client to server: client proof
//	welcome    server to client: verdict
//
// A proof is HMAC-SHA256 under the shared key over a label for its direction and every field of the
// hello and the server's nonce, so that no proof serves for another dataset, role, direction or
// connection. The server proves itself too: a client never takes bytes from a stranger on a reused
// address.

const (
	helloSize     = 4 + 1 + 8 + 32 + 32
	challengeSize = 1 + 32 + 32
	answerSize    = 32
	welcomeSize   = 1
)

var helloMagic = [4]byte{'S', 'C', 'h', '2'}

// Verdicts. They are hints for people: they come before the server has proved anything.
const (
	verdictOK           = 1
	verdictWrongDataset = 2
	verdictUnknownKey   = 3
	verdictBadProof     = 4
	verdictBadHello     = 5
)

func verdictError(v byte) error {
	switch v {
	case verdictWrongDataset:
		return fmt.Errorf("%w: the worker serves another dataset", ErrUnauthorized)
	case verdictUnknownKey:
		return fmt.Errorf("%w: the worker does not know this key for this role: check that both use the Dataset's current keys", ErrUnauthorized)
	case verdictBadHello:
		return fmt.Errorf("the worker speaks %w: run the same release on both sides", ErrVersion)
	}
	return fmt.Errorf("%w: the worker refused the handshake (verdict %d)", ErrUnauthorized, v)
}

// Refused says whether err is of a handshake that the other side refused, whatever for.
func Refused(err error) bool { return errors.Is(err, ErrUnauthorized) || errors.Is(err, ErrVersion) }

func proof(key Key, direction string, hello, serverNonce []byte) []byte {
	mac := hmac.New(sha256.New, key[:])
	// Every part has a fixed length but the label, which is ended by a byte that it cannot hold.
	io.WriteString(mac, "stepcache handshake 1 "+direction+"\x00")
	mac.Write(hello)
	mac.Write(serverNonce)
	return mac.Sum(nil)
}

// Connect makes an authenticated connection of a role by dial, or fails with what dial or the server said last. During a
// rotation of keys the server may know only the older one: each is tried, the current one first. then, which may be nil,
// is what comes next over the connection and belongs to the try: its error closes it too.
func Connect(ctx context.Context, dial func(ctx context.Context) (net.Conn, error), dataset string, role Role, keys Keys, then func(ctx context.Context, conn net.Conn) error) (net.Conn, error) {
	err := fmt.Errorf("%w: no %s key: give this side the Dataset's keys", ErrUnauthorized, role)
	for _, key := range keys.Of(role) {
		var conn net.Conn
		if conn, err = dial(ctx); err != nil {
			return nil, err
		}
		if err = ClientHandshake(ctx, conn, dataset, role, key); err == nil && then != nil {
			err = then(ctx, conn)
		}
		if err == nil {
			return conn, nil
		}
		conn.Close()
		if !errors.Is(err, ErrUnauthorized) {
			return nil, err
		}
	}
	return nil, err
}

// ClientHandshake proves to the server at conn that this side holds key, and checks that the server
// does. It takes at most DialTimeout, or as long as ctx lasts. After an error conn must be closed. An
// error that wraps ErrUnauthorized does not go away by trying again with the same key, one that wraps ErrVersion not
// with another.
func ClientHandshake(ctx context.Context, conn net.Conn, dataset string, role Role, key Key) (err error) {
	ctx, cancel := context.WithTimeout(ctx, DialTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx) // the deadline set above may be in force already
		}
		if err == nil {
			err = conn.SetDeadline(time.Time{})
		}
		if err != nil {
			err = fmt.Errorf("handshake: %w", err)
		}
	}()

	hello := make([]byte, 0, helloSize)
	hello = append(hello, helloMagic[:]...)
	hello = append(hello, byte(role))
	id := key.ID()
	hello = append(hello, id[:]...)
	name := sha256.Sum256([]byte(dataset))
	hello = append(hello, name[:]...)
	var nonce [32]byte
	rand.Read(nonce[:])
	hello = append(hello, nonce[:]...)
	if _, err := conn.Write(hello); err != nil {
		return err
	}
	var challenge [challengeSize]byte
	if err := readFull(conn, challenge[:]); err != nil {
		return err
	}
	if challenge[0] != verdictOK {
		return verdictError(challenge[0])
	}
	if !hmac.Equal(challenge[33:], proof(key, "server", hello, challenge[1:33])) {
		return fmt.Errorf("%w: what answers at %s does not hold the dataset's key", ErrUnauthorized, conn.RemoteAddr())
	}
	if _, err := conn.Write(proof(key, "client", hello, challenge[1:33])); err != nil {
		return err
	}
	var welcome [welcomeSize]byte
	if err := readFull(conn, welcome[:]); err != nil {
		return err
	}
	if welcome[0] != verdictOK {
		return verdictError(welcome[0])
	}
	return nil
}

// ServerHandshake checks that the client at conn holds a key of the role it claims, proves that this
// side does, and returns the role, and the key's name for a server that ends the connections of a key that is taken
// away. It takes at most DialTimeout and reads a fixed number of bytes. After an error conn must be closed.
func ServerHandshake(conn net.Conn, dataset string, keys Keys) (role Role, id KeyID, err error) {
	defer func() {
		if err != nil {
			role, err = 0, fmt.Errorf("handshake with %s: %w", conn.RemoteAddr(), err)
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(DialTimeout)); err != nil {
		return 0, id, err
	}
	var hello [helloSize]byte
	if err := readFull(conn, hello[:]); err != nil {
		return 0, id, err
	}
	refuse := func(size int, verdict byte, why string) (Role, KeyID, error) {
		// One write, so that it is one packet; whether it arrives does not matter.
		msg := make([]byte, size)
		msg[0] = verdict
		conn.Write(msg)
		return 0, id, fmt.Errorf("%w: %s", ErrUnauthorized, why)
	}
	if !bytes.Equal(hello[:4], helloMagic[:]) {
		return refuse(challengeSize, verdictBadHello, "not this protocol, or another version of it")
	}
	role = Role(hello[4])
	name := sha256.Sum256([]byte(dataset))
	if !hmac.Equal(hello[13:45], name[:]) {
		return refuse(challengeSize, verdictWrongDataset, "for another dataset")
	}
	id = KeyID(hello[5:13])
	key, ok := keys.find(role, id)
	if !ok {
		return refuse(challengeSize, verdictUnknownKey, "unknown "+role.String()+" key")
	}
	challenge := make([]byte, 33, challengeSize)
	challenge[0] = verdictOK
	rand.Read(challenge[1:33])
	challenge = append(challenge, proof(key, "server", hello[:], challenge[1:33])...)
	if _, err := conn.Write(challenge); err != nil {
		return 0, id, err
	}
	var answer [answerSize]byte
	if err := readFull(conn, answer[:]); err != nil {
		return 0, id, err
	}
	if !hmac.Equal(answer[:], proof(key, "client", hello[:], challenge[1:33])) {
		return refuse(welcomeSize, verdictBadProof, "wrong proof for a "+role.String()+" key")
	}
	if _, err := conn.Write([]byte{verdictOK}); err != nil {
		return 0, id, err
	}
	return role, id, conn.SetDeadline(time.Time{})
}

func readFull(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
