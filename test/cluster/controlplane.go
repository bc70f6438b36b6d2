package main

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// controlPlane are the processes of the control plane, in the order in which they start. CoreDNS is one of
// them, not a pod, so that names still resolve after any node is killed; and so is a kube-proxy, so that
// the API server's webhook calls and exec-in-lab reach Services.
var controlPlane = []string{"etcd", "apiserver", "controller-manager", "scheduler", "coredns", "proxy"}

//go:embed manifests/audit-policy.yaml
var auditPolicy []byte

const corefile = `cluster.local:53 in-addr.arpa:53 {
	bind %[1]s
	errors
	ready 127.0.0.1:8181
	kubernetes cluster.local in-addr.arpa {
		kubeconfig %[2]s
		pods insecure
		ttl 5
	}
	cache 5
}
# There is nothing beyond the cluster.
.:53 {
	bind %[1]s
	template ANY ANY {
		rcode NXDOMAIN
	}
}
`

func (c *Cluster) auditLog() string { return c.log("audit") }

func (c *Cluster) startControlPlane(ctx context.Context) error {
	if err := c.makeNetwork(); err != nil {
		return err
	}
	files := map[string][]byte{
		"audit-policy.yaml": auditPolicy,
		"Corefile":          fmt.Appendf(nil, corefile, controlPlaneIP, c.kubeconfig("coredns")),
		"proxy.yaml":        proxyConfig(nodes[0].name, controlPlaneIP, c.kubeconfig("proxy")),
		"resolv.conf":       []byte("nameserver " + controlPlaneIP + "\nsearch svc.cluster.local cluster.local\noptions ndots:2\n"),
	}
	for name, content := range files {
		if err := os.WriteFile(c.run(name), content, 0o644); err != nil {
			return err
		}
	}
	run := func(name, program string, args ...string) error {
		return c.start(name, c.name, exec.Command(c.bin(program), args...))
	}
	err := run("etcd", "etcd",
		"--data-dir", c.run("etcd"), "--log-level", "warn",
		"--listen-client-urls", "http://127.0.0.1:2379", "--advertise-client-urls", "http://127.0.0.1:2379",
		"--listen-peer-urls", "http://127.0.0.1:2380",
		// Its data is worth nothing after the machine stops.
		"--unsafe-no-fsync")
	if err != nil {
		return err
	}
	err = run("apiserver", "kube-apiserver",
		"--etcd-servers", "http://127.0.0.1:2379",
		"--bind-address", "0.0.0.0", "--secure-port", "6443", "--advertise-address", controlPlaneIP,
		"--kubelet-preferred-address-types", "InternalIP", // node names are in no DNS
		"--allow-privileged=true",
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", // added to the defaults
		"--tls-cert-file", c.pki("apiserver.crt"), "--tls-private-key-file", c.pki("apiserver.key"),
		"--client-ca-file", c.pki("ca.crt"), "--kubelet-certificate-authority", c.pki("ca.crt"),
		"--kubelet-client-certificate", c.pki("kubelet-client.crt"), "--kubelet-client-key", c.pki("kubelet-client.key"),
		"--requestheader-client-ca-file", c.pki("front-proxy-ca.crt"), "--requestheader-allowed-names", "front-proxy-client",
		"--requestheader-username-headers", "X-Remote-User", "--requestheader-group-headers", "X-Remote-Group",
		"--requestheader-extra-headers-prefix", "X-Remote-Extra-",
		"--proxy-client-cert-file", c.pki("front-proxy-client.crt"), "--proxy-client-key-file", c.pki("front-proxy-client.key"),
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", c.pki("service-account.pub"), "--service-account-signing-key-file", c.pki("service-account.key"),
		"--service-cluster-ip-range", serviceCIDR,
		// Pods leave a dead node after half a minute, not five: tests wait for it.
		"--default-not-ready-toleration-seconds", "30", "--default-unreachable-toleration-seconds", "30",
		"--audit-policy-file", c.run("audit-policy.yaml"), "--audit-log-path", c.auditLog(), "--audit-log-maxsize", "2000",
		"--v", "1")
	if err != nil {
		return err
	}
	err = until(ctx, 2*time.Minute, func(ctx context.Context) error {
		_, err := c.kubectl(ctx, "get", "--raw", "/readyz")
		return err
	})
	if err != nil {
		return fmt.Errorf("the API server does not start: %w\n%s", err, c.tail("apiserver"))
	}
	c.say("API server ready")
	user := func(name string) []string {
		return []string{"--kubeconfig", c.kubeconfig(name), "--authentication-kubeconfig", c.kubeconfig(name),
			"--authorization-kubeconfig", c.kubeconfig(name), "--leader-elect=false", "--bind-address", "127.0.0.1", "--v", "1"}
	}
	err = run("controller-manager", "kube-controller-manager", append(user("controller-manager"),
		"--use-service-account-credentials=true",
		// With the kubelets' short leases a dead node is noticed in half a minute.
		"--node-monitor-grace-period", "25s",
		"--root-ca-file", c.pki("ca.crt"), "--service-account-private-key-file", c.pki("service-account.key"),
		"--cluster-signing-cert-file", c.pki("ca.crt"), "--cluster-signing-key-file", c.pki("ca.key"),
		"--service-cluster-ip-range", serviceCIDR)...)
	if err != nil {
		return err
	}
	if err := run("scheduler", "kube-scheduler", user("scheduler")...); err != nil {
		return err
	}
	if err := run("coredns", "coredns", "-conf", c.run("Corefile")); err != nil {
		return err
	}
	return run("proxy", "kube-proxy", "--config", c.run("proxy.yaml"))
}

// proxyConfig is a kube-proxy's configuration. Its host must be a node: kube-proxy does nothing before a
// node of that name exists, so the control plane's takes n1's. It leaves the machine's connection tracking alone.
func proxyConfig(host, ip, kubeconfig string) []byte {
	return fmt.Appendf(nil, `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: %q}
clusterCIDR: %s
hostnameOverride: %s
bindAddress: %s
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
healthzBindAddress: ""
metricsBindAddress: "127.0.0.1:10249"
`, kubeconfig, podCIDR, host, ip)
}
