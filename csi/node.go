package csi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
	"github.com/stepcache/stepcache/cache/mount"
	"github.com/stepcache/stepcache/cache/mount/mountinfo"
	"github.com/stepcache/stepcache/cache/wire"
)

// NodeGetInfo implements csi.NodeServer.
func (s *service) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: s.config.NodeName}, nil
}

// NodeGetCapabilities implements csi.NodeServer.
func (s *service) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	r := &csi.NodeGetCapabilitiesResponse{}
	for _, c := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
	} {
		r.Capabilities = append(r.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: c}},
		})
	}
	return r, nil
}

// NodeStageVolume implements csi.NodeServer. The kubelet calls it once a volume, before the first pod that has it;
// nothing is kept at the staging path. It makes the mount, so that the pod finds it made.
func (s *service) NodeStageVolume(ctx context.Context, r *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, invalid("no volume id")
	case r.GetStagingTargetPath() == "":
		return nil, invalid("no staging target path")
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	v, err := parseVolume(r.GetVolumeContext(), r.GetSecrets())
	if err != nil {
		return nil, err
	}
	if v.kind != v1alpha1.VolumeDataset || v.inline {
		return nil, invalid("an inline volume is not staged")
	}
	unlock, err := s.lock(r.GetStagingTargetPath())
	if err != nil {
		return nil, err
	}
	defer unlock()
	_, done, err := s.take(ctx, v)
	if err != nil {
		return nil, failed(err)
	}
	done()
	return &csi.NodeStageVolumeResponse{}, nil
}

// NodeUnstageVolume implements csi.NodeServer. The mount goes when no pod has had it for a while.
func (s *service) NodeUnstageVolume(_ context.Context, r *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, invalid("no volume id")
	case r.GetStagingTargetPath() == "":
		return nil, invalid("no staging target path")
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

// NodePublishVolume implements csi.NodeServer.
func (s *service) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, invalid("no volume id")
	case r.GetTargetPath() == "":
		return nil, invalid("no target path")
	}
	if err := checkCapability(r.GetVolumeCapability()); err != nil {
		return nil, err
	}
	v, err := parseVolume(r.GetVolumeContext(), r.GetSecrets())
	if err != nil {
		return nil, err
	}
	target, err := cleanPath(r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := s.lock(target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	group := r.GetVolumeCapability().GetMount().GetVolumeMountGroup()
	switch v.kind {
	case v1alpha1.VolumeStore:
		err = s.publish(target, "tmpfs", storeSource, func() error { return s.mountStore(target, v, group) })
	case v1alpha1.VolumeSocket:
		err = s.publish(target, "tmpfs", socketSource, func() error { return s.mountSocket(target, v, group) })
	case v1alpha1.VolumeLent:
		err = s.lender.publishMount(target, v)
	case v1alpha1.VolumeLender:
		err = s.lender.publishSocket(target, v)
	default:
		err = s.publishDataset(ctx, target, v)
	}
	if errors.Is(err, unix.EROFS) { // this container's own files
		err = fmt.Errorf("%w: the kubelet's folder is not %s, it seems: set --kubelet-dir", err, s.config.KubeletDir)
	}
	if err != nil {
		return nil, failed(err)
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish mounts something of the pod's own at target, unless it is there.
func (s *service) publish(target, fstype, source string, make func() error) error {
	at, err := mountinfo.At(target)
	if err != nil {
		return err
	}
	if len(at) > 0 {
		if at[0].Type == fstype && at[0].Source == source {
			return nil // a call that is repeated
		}
		return status.Errorf(codes.FailedPrecondition, "%s is a mount of another kind already (%s)", target, at[0].Type)
	}
	if err := os.MkdirAll(target, 0o750); err != nil {
		return err
	}
	if err := make(); err != nil {
		_ = os.Remove(target)
		return err
	}
	return nil
}

// publishDataset binds the mount of the current snapshot at target. A pod whose container is started again, or
// whose call is repeated, keeps what it has; only a dead mount is replaced.
func (s *service) publishDataset(ctx context.Context, target string, v volume) error {
	if _, served, err := s.servedAt(target, v); err != nil || served {
		return err
	}
	m, done, err := s.take(ctx, v)
	if err != nil {
		return err
	}
	defer done()
	at, served, err := s.servedAt(target, v) // it may have been resumed meanwhile
	if err != nil || served {
		return err
	}
	if len(at) > 0 && at[0].Type == mount.FSType && !s.dead(ctx, target) {
		return status.Errorf(codes.Unavailable, "the mount at %s waits to be served again; if it stays so, delete the pod", target)
	}
	if len(at) > 0 {
		s.log.Warn("a dead mount is replaced", "target", target, "source", at[0].Source)
		if _, err := mountinfo.Detach(target, nil); err != nil {
			return err
		}
	} else if err := os.MkdirAll(target, 0o750); err != nil {
		return err
	}
	if err := unix.Mount(m.dir, target, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(&fs.PathError{Op: "bind " + m.dir, Path: target, Err: err}, os.Remove(target))
	}
	const flags = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV
	if err := unix.Mount("", target, "", flags, ""); err != nil {
		_, derr := mountinfo.Detach(target, nil)
		return errors.Join(&fs.PathError{Op: "make read-only", Path: target, Err: err}, derr, os.Remove(target))
	}
	return nil
}

// servedAt says what is mounted at a path, and whether this process serves it for the Dataset.
func (s *service) servedAt(target string, v volume) (at []mountinfo.Mount, served bool, err error) {
	at, err = mountinfo.At(target)
	return at, len(at) > 0 && at[0].Type == mount.FSType && s.serves(v.name(), deviceOf(at[0])), err
}

// serves says whether a file system is one that this process serves for the Dataset.
func (s *service) serves(name string, d device) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if set := s.sets[name]; set != nil {
		for _, m := range set.mounts {
			if m.device == d {
				return !ended(m.server)
			}
		}
	}
	return false
}

// NodeUnpublishVolume implements csi.NodeServer.
func (s *service) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, invalid("no volume id")
	case r.GetTargetPath() == "":
		return nil, invalid("no target path")
	}
	target, err := cleanPath(r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	unlock, err := s.lock(target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	at, err := mountinfo.At(target)
	if err != nil {
		return nil, failed(err)
	}
	if len(at) > 0 && at[0].Source == socketSource {
		if err := s.hideSockets(func(m mountinfo.Mount, _ []mountinfo.Mount) bool { return deviceOf(m) == deviceOf(at[0]) }); err != nil {
			s.log.Warn("a worker's socket is left", "error", err)
		}
	}
	if lentAt(at) {
		if err := s.lender.unpublish(ctx, target, at); err != nil {
			s.log.Warn("a pod's own mount is taken away all the same", "target", target, "error", err)
		}
	}
	// Lazily, whatever is there and in whatever state: a pod must never be left Terminating by it.
	if _, err := mountinfo.Detach(target, nil); err != nil {
		return nil, failed(err)
	}
	// Only an empty folder: never what a mount that could not be taken away shows.
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, failed(err)
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeGetVolumeStats implements csi.NodeServer. A dataset's figures come from its snapshot: nothing is asked of a
// file system that may not answer.
func (s *service) NodeGetVolumeStats(_ context.Context, r *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	switch {
	case r.GetVolumeId() == "":
		return nil, invalid("no volume id")
	case r.GetVolumePath() == "":
		return nil, invalid("no volume path")
	}
	path, err := cleanPath(r.GetVolumePath())
	if err != nil {
		return nil, status.Errorf(codes.NotFound, "volume %s is not at %s", r.GetVolumeId(), r.GetVolumePath())
	}
	at, err := mountinfo.At(path)
	if err != nil {
		return nil, failed(err)
	}
	if len(at) == 0 {
		return nil, status.Errorf(codes.NotFound, "volume %s is not at %s", r.GetVolumeId(), path)
	}
	switch {
	case at[0].Type == mount.FSType && lentAt(at):
		return usage(0, 0, 0, 0, 0, 0), nil // only its server knows, which is the pod
	case at[0].Type == mount.FSType:
		d := deviceOf(at[0])
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, set := range s.sets {
			for _, m := range set.mounts {
				if m.device != d {
					continue
				}
				if c := m.client.Client(); c != nil {
					snap := c.Snapshot()
					return usage(snap.Bytes(), 0, snap.Bytes(), int64(snap.Files()), 0, int64(snap.Files())), nil
				}
				return usage(0, 0, 0, 0, 0, 0), nil // how much a writable Dataset has nobody counts
			}
		}
		return nil, status.Errorf(codes.Unavailable, "volume %s: the mount at %s is dead; restart the pod", r.GetVolumeId(), path)
	case at[0].Type == "tmpfs" && (at[0].Source == storeSource || at[0].Source == socketSource || lentAt(at)):
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			return nil, failed(err)
		}
		size := int64(st.Bsize)
		return usage(int64(st.Blocks)*size, int64(st.Bavail)*size, int64(st.Blocks-st.Bfree)*size,
			int64(st.Files), int64(st.Ffree), int64(st.Files-st.Ffree)), nil
	}
	return nil, status.Errorf(codes.NotFound, "volume %s: at %s is a mount of another kind (%s)", r.GetVolumeId(), path, at[0].Type)
}

func usage(total, available, used, inodes, free, taken int64) *csi.NodeGetVolumeStatsResponse {
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: total, Available: available, Used: used},
		{Unit: csi.VolumeUsage_INODES, Total: inodes, Available: free, Used: taken},
	}}
}

// checkCapability refuses block devices. Any access mode will do: datasets are read-only whatever a claim says.
func checkCapability(c *csi.VolumeCapability) error {
	switch {
	case c == nil:
		return invalid("no volume capability")
	case c.GetBlock() != nil:
		return invalid("volumeMode Block: a dataset is files; use Filesystem")
	case c.GetMount() == nil:
		return invalid("no access type")
	}
	return nil
}

// cleanPath resolves a path whose last part may be a dead mount, or missing.
func cleanPath(path string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", invalid("path %q is not absolute", path)
	}
	path = filepath.Clean(path)
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return path, nil
		}
		return "", failed(err)
	}
	return filepath.Join(dir, filepath.Base(path)), nil
}

// lock keeps calls for one path apart.
func (s *service) lock(path string) (unlock func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy[path] {
		return nil, status.Errorf(codes.Aborted, "another call for %s is under way", path)
	}
	s.busy[path] = true
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.busy, path)
	}, nil
}

// failed gives an error the code that it has, or the one that suits it.
func failed(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codes.Internal
	switch {
	case errors.Is(err, wire.ErrUnauthorized):
		code = codes.PermissionDenied
	case errors.Is(err, wire.ErrVersion):
		code = codes.FailedPrecondition
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	}
	return status.Error(code, err.Error())
}
