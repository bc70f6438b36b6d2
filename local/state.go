package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
)

// socketPath is the room that Unix socket paths of a run need below its folder: /d99/w999.sock.
const socketPath = 107 - len("/d99/w999.sock")

// state is a run's folder. It is locked while the run lives, so that what a killed run left can be told.
type state struct {
	dir    string
	lock   *os.File
	claims []*os.File // the locked folders of mounts
}

// openState makes the folder of this run, and first removes those of runs that were killed.
func openState() (*state, error) {
	// One folder a user, in the short temporary folder rather than a home: socket paths are short.
	parent := filepath.Join(os.TempDir(), "stepcache-"+strconv.Itoa(os.Getuid()))
	if err := os.Mkdir(parent, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make the folder of local runs: %w; set TMPDIR to a folder that you can write", err)
	}
	if err := private(parent); err != nil {
		return nil, err
	}
	sweep(parent)
	dir, err := os.MkdirTemp(parent, "r")
	if err != nil {
		return nil, err
	}
	if len(dir) > socketPath {
		_ = os.Remove(dir)
		return nil, fmt.Errorf("the temporary folder's name %s is too long for the Unix sockets below it (%d characters at most): set TMPDIR to a shorter one", dir, socketPath)
	}
	// It gets its name once it is locked: another run takes a lock that nobody holds for that of one that was killed.
	lock, err := lockFile(filepath.Join(dir, newName), os.O_CREATE)
	if err == nil {
		_, err = fmt.Fprintln(lock, os.Getpid()) // see inUse
	}
	if err == nil {
		err = os.Rename(lock.Name(), filepath.Join(dir, lockName))
	}
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	return &state{dir: dir, lock: lock}, nil
}

// private refuses a folder that another user could have put there.
func private(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return err
	}
	if !info.IsDir() || int(st.Uid) != os.Getuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a folder of yours alone: remove it, or set TMPDIR", dir)
	}
	return nil
}

// lockName is the file in a run's folder that it has locked; it is newName until it is locked.
const lockName, newName = "lock", "new"

// making is far longer than a folder is without its lock while a run is being made.
const making = time.Hour

func lockFile(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// sweep removes what killed runs left. It is best effort: a folder that cannot be removed is in nobody's
// way.
func sweep(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(parent, e.Name())
		lock, err := lockFile(filepath.Join(dir, lockName), 0)
		if errors.Is(err, fs.ErrNotExist) {
			if info, err := e.Info(); err == nil && info.IsDir() && time.Since(info.ModTime()) > making {
				// Of a run that was killed before it had the lock; what has more in it is not a run's.
				_ = os.Remove(filepath.Join(dir, newName))
				_ = os.Remove(dir)
			}
		}
		if err != nil {
			continue // alive, being made, or not a run's
		}
		(&state{dir: dir, lock: lock}).close()
	}
}

// mountFolder makes the folder that mounts go into, where there is none, and resolves its name as the
// kernel will tell it.
func (s *state) mountFolder(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := s.folder(abs); err != nil {
		return "", fmt.Errorf("cannot make the folder for mounts: %w; name another one with --mount", err)
	}
	return filepath.EvalSymlinks(abs)
}

// claim makes sure that this run alone mounts at target, makes its folder where there is none, and notes it
// for whoever cleans up. What others mounted or put there is never touched or hidden.
func (s *state) claim(target string) error {
	const other = "name another folder with --mount"
	// First of all the mounts: a look at one that nobody serves would hang.
	if err := s.clear(target); err != nil {
		return err
	}
	if err := s.folder(target); err != nil {
		return fmt.Errorf("cannot mount at %s: %w; %s", target, err, other)
	}
	f, err := os.OpenFile(target, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("cannot mount at %s: it is not a folder; %s", target, other)
	}
	if err != nil {
		return fmt.Errorf("cannot mount: %w; %s", err, other)
	}
	s.claims = append(s.claims, f)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return s.inUse(target)
	}
	if err := s.clear(target); err != nil {
		return err
	}
	if names, _ := f.Readdirnames(1); len(names) > 0 {
		return fmt.Errorf("cannot mount at %s: it is not empty, and its files would be hidden; empty it, or %s", target, other)
	}
	return s.note("mounts", target)
}

// clear takes dead mounts of ours away from a folder; one that is alive is an error.
func (s *state) clear(target string) error {
	at, err := mountinfo.At(target)
	if err != nil || len(at) == 0 {
		return err
	}
	if at[0].Type == mount.FSType {
		if alive(at[0]) {
			return s.inUse(target)
		}
		if detach(target); !mounted(target) {
			return nil
		}
	}
	return fmt.Errorf("cannot mount at %s: something is mounted there already (%s, from %s); unmount it (umount %s), or name another folder with --mount",
		target, at[0].Type, at[0].Source, target)
}

// inUse is the error of a target that another process of ours serves, or is about to; which one is known of runs with
// the same temporary folder.
func (s *state) inUse(target string) error {
	who := "another stepcache"
	locks, _ := filepath.Glob(filepath.Join(filepath.Dir(s.dir), "*", lockName))
	for _, lock := range locks {
		run := &state{dir: filepath.Dir(lock)}
		if pid, err := os.ReadFile(lock); err == nil && run.dir != s.dir && slices.Contains(run.notes("mounts"), target) {
			who = "another `stepcache local`, process " + strings.TrimSpace(string(pid)) + ","
		}
	}
	return fmt.Errorf("cannot mount at %s: %s uses it; end that one (Ctrl-C or SIGTERM, which also unmounts), or name another folder with --mount", target, who)
}

func mounted(target string) bool {
	at, err := mountinfo.At(target)
	return err != nil || len(at) > 0
}

// served says whether somebody serves a mount of ours at target.
func served(target string) bool {
	at, err := mountinfo.At(target)
	return err == nil && len(at) > 0 && at[0].Type == mount.FSType && alive(at[0])
}

// detach takes away the mounts of ours at target whose process has died. Others are not ours to end.
func detach(target string) {
	_, err := mountinfo.Detach(target, alive)
	if errors.Is(err, unix.EPERM) {
		if at, err := mountinfo.At(target); err == nil && len(at) > 0 && !alive(at[0]) {
			_ = exec.Command("fusermount3", "-u", "-z", target).Run()
		}
	}
}

// alive says whether a mount is anything but one of ours that nobody serves. The kernel tells at once when
// the process is gone; one that does not answer may only be slow.
func alive(m mountinfo.Mount) bool {
	if m.Type != mount.FSType {
		return true
	}
	answer := make(chan error, 1)
	go func() {
		// Unlike stat's, no answer of this is kept by the kernel.
		var st unix.Statfs_t
		answer <- unix.Statfs(m.Point, &st)
	}()
	select {
	case err := <-answer:
		return !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.ECONNABORTED)
	case <-time.After(answerTimeout):
		return true
	}
}

// answerTimeout is how long a mount may take to answer.
const answerTimeout = 5 * time.Second

// folder makes a folder and those above it, noting each one that it made.
func (s *state) folder(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.folder(filepath.Dir(dir)); err != nil {
			return err
		}
		err = os.Mkdir(dir, 0o755)
	}
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.note("made", dir)
}

// shared makes a folder in shared memory that goes away with the run.
func (s *state) shared() (string, error) {
	dir, err := os.MkdirTemp("/dev/shm", "stepcache-")
	if err != nil {
		return "", err
	}
	return dir, s.note("folders", dir)
}

// note adds a line to a file of the run's folder, and notes reads it.
func (s *state) note(file, line string) error {
	f, err := os.OpenFile(filepath.Join(s.dir, file), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%q\n", line)
	return errors.Join(err, f.Close())
}

func (s *state) notes(file string) (lines []string) {
	b, err := os.ReadFile(filepath.Join(s.dir, file))
	if err != nil {
		return nil
	}
	for quoted := range strings.Lines(string(b)) {
		if line, err := strconv.Unquote(strings.TrimSpace(quoted)); err == nil {
			lines = append(lines, line)
		}
	}
	return lines
}

// close unmounts what is mounted in the folder or was noted, and removes it.
func (s *state) close() {
	for _, target := range s.notes("mounts") {
		// The process that served it has ended, or is about to: the kernel kills the children of a killed run.
		for start := time.Now(); served(target) && time.Since(start) < stopTimeout; {
			time.Sleep(10 * time.Millisecond)
		}
		detach(target)
	}
	for _, dir := range slices.Backward(s.notes("made")) {
		_ = os.Remove(dir) // goes only if it is empty
	}
	for _, dir := range s.notes("folders") {
		_ = os.RemoveAll(dir)
	}
	if below, err := mountinfo.Below(s.dir); err == nil {
		for _, m := range below {
			_, _ = mountinfo.Detach(m.Point, nil)
		}
	}
	_ = os.RemoveAll(s.dir)
	for _, f := range s.claims {
		_ = f.Close()
	}
	_ = s.lock.Close()
}
