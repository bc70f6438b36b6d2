package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

func (c *Cluster) pki(file string) string        { return filepath.Join(c.state, "pki", file) }
func (c *Cluster) kubeconfig(user string) string { return c.pki(user + ".kubeconfig") }

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// identity is what a certificate says.
type identity struct {
	file   string // in the folder pki
	name   string
	groups []string
	ips    []string
	hosts  []string
}

// makeKeys makes new keys for every part of a new cluster: nothing expires while a cluster runs, and a
// kubeconfig of a former cluster opens nothing.
func (c *Cluster) makeKeys() error {
	ca, err := c.newAuthority("ca")
	if err != nil {
		return err
	}
	proxyCA, err := c.newAuthority("front-proxy-ca")
	if err != nil {
		return err
	}
	ids := []identity{
		{file: "apiserver", name: "kube-apiserver", ips: []string{controlPlaneIP, "127.0.0.1", "10.96.0.1"},
			hosts: []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}},
		{file: "kubelet-client", name: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
		{file: "admin", name: "admin", groups: []string{"system:masters"}},
		{file: "controller-manager", name: "system:kube-controller-manager"},
		{file: "scheduler", name: "system:kube-scheduler"},
		{file: "proxy", name: "system:kube-proxy"},
		{file: "coredns", name: "coredns", groups: []string{"system:masters"}},
	}
	for _, n := range nodes {
		ids = append(ids, identity{file: n.name, name: "system:node:" + n.name, groups: []string{"system:nodes"}, ips: []string{n.ip}, hosts: []string{n.name}})
	}
	for _, id := range ids {
		if err := c.issue(ca, id); err != nil {
			return fmt.Errorf("make the certificate of %s: %w", id.name, err)
		}
	}
	// An aggregated API server recognises kube-apiserver by this one.
	if err := c.issue(proxyCA, identity{file: "front-proxy-client", name: "front-proxy-client"}); err != nil {
		return err
	}
	return c.newServiceAccountKey()
}

func (c *Cluster) newAuthority(file string) (*authority, error) {
	key, err := c.newKey(file)
	if err != nil {
		return nil, err
	}
	cert := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: file},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key}, c.writePEM(file+".crt", "CERTIFICATE", der)
}

// issue writes a key, its certificate, and a kubeconfig that uses them.
func (c *Cluster) issue(ca *authority, id identity) error {
	key, err := c.newKey(id.file)
	if err != nil {
		return err
	}
	cert := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: id.name, Organization: id.groups}, DNSNames: id.hosts,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, ip := range id.ips {
		cert.IPAddresses = append(cert.IPAddresses, net.ParseIP(ip))
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	if err := c.writePEM(id.file+".crt", "CERTIFICATE", der); err != nil {
		return err
	}
	return os.WriteFile(c.kubeconfig(id.file), fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: stepcache, cluster: {server: %q, certificate-authority: ca.crt}}]
users: [{name: %s, user: {client-certificate: %[2]s.crt, client-key: %[2]s.key}}]
contexts: [{name: stepcache, context: {cluster: stepcache, user: %[2]s}}]
current-context: stepcache
`, apiServer, id.file), 0o600)
}

func (c *Cluster) newKey(file string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, c.writePEM(file+".key", "EC PRIVATE KEY", der)
}

// newServiceAccountKey makes the key that signs the tokens of service accounts.
func (c *Cluster) newServiceAccountKey() error {
	key, err := c.newKey("service-account")
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return c.writePEM("service-account.pub", "PUBLIC KEY", der)
}

func (c *Cluster) writePEM(file, kind string, der []byte) error {
	return os.WriteFile(c.pki(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return n
}
