package csi

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/stepcache/stepcache/api/v1alpha1"
)

// provisioner stands for our controller, which makes PersistentVolumes without CSI: the suite wants volumes from a
// CSI controller service. What it makes is the Dataset's one volume, under many names.
type provisioner struct {
	csi.UnimplementedControllerServer
	csi.UnimplementedIdentityServer
	*service
	n atomic.Int64
}

// GetPluginInfo and the others of the identity service are the real ones.
func (p *provisioner) GetPluginInfo(ctx context.Context, r *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return p.service.GetPluginInfo(ctx, r)
}

func (p *provisioner) Probe(ctx context.Context, r *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return p.service.Probe(ctx, r)
}

func (p *provisioner) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{
		Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: csi.PluginCapability_Service_CONTROLLER_SERVICE}},
	}}}, nil
}

func (p *provisioner) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{{
		Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME}},
	}}}, nil
}

func (p *provisioner) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if r.GetName() == "" {
		return nil, status.Error(codes.InvalidArgument, "no name")
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId:      fmt.Sprintf("%s/%d", testDataset, p.n.Add(1)),
		VolumeContext: map[string]string{v1alpha1.AttributeNamespace: "argo", v1alpha1.AttributeDataset: "genomes"},
	}}, nil
}

func (p *provisioner) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}

// envSuite says that this process was started to run the suite.
const envSuite = "STEPCACHE_CSI_TEST_SUITE"

func TestSanity(t *testing.T) {
	needMounts(t)
	if os.Getenv(envSuite) == "" {
		// The suite can run once in a process only, and not with -count: it gets one of its own.
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		c := exec.CommandContext(testContext(t), exe, "-test.run=^TestSanity$", "-test.count=1", "-test.v")
		c.Env = append(os.Environ(), envSuite+"=1")
		c.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		if out, err := c.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("--- PASS: TestSanity")) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	k := newTier(t, someFiles())
	k.publish(1, "")
	m := newMachine(t, k)
	m.keep()
	n := m.run(nil)

	socket := filepath.Join(m.base, "sanity.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(n.s.call))
	p := &provisioner{service: n.s}
	csi.RegisterIdentityServer(server, p)
	csi.RegisterControllerServer(server, p)
	csi.RegisterNodeServer(server, n.s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	defer func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	secrets := filepath.Join(m.base, "secrets.yaml")
	key := strings.TrimSpace(n.secret[v1alpha1.KeyRead])
	if err := os.WriteFile(secrets, fmt.Appendf(nil, "NodeStageVolumeSecret: {read: %q}\nNodePublishVolumeSecret: {read: %q}\n", key, key), 0o600); err != nil {
		t.Fatal(err)
	}
	config := sanity.NewTestConfig()
	config.Address = "unix:" + socket
	config.TargetPath, config.StagingPath = filepath.Join(m.base, "target"), filepath.Join(m.base, "staging")
	config.SecretsFile = secrets
	sc := sanity.GinkgoTest(&config)
	defer sc.Finalize()
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	// The controller service is this file's.
	suite.SkipStrings = append(suite.SkipStrings, `Controller Service \[Controller Server\]`, `GroupController`, `Snapshot`)
	reporter.Succinct = true
	reporter.NoColor = true
	passed := 0
	ginkgo.ReportAfterSuite("count", func(r ginkgo.Report) { passed = r.SpecReports.CountWithState(types.SpecStatePassed) })
	if !ginkgo.RunSpecs(t, "CSI driver", suite, reporter) {
		t.Fatal("the suite fails")
	}
	// Identity 4, node service 20: less means that the suite skipped what it should try.
	if passed < 20 {
		t.Errorf("only %d specs were run", passed)
	}

	if err := n.s.reap(-1); err != nil {
		t.Error(err)
	}
	if n := fuseMounts(t, m.base); n != 0 {
		t.Errorf("%d mounts are left", n)
	}
	for _, dir := range []string{config.TargetPath, config.StagingPath} {
		if _, err := os.Lstat(dir); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}
