package webhook

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kclient "sigs.k8s.io/controller-runtime/pkg/client"
)

// Lifetimes of certificates. Each is replaced when a third of its life is left.
const (
	authorityLife = 5 * 365 * 24 * time.Hour
	servingLife   = 90 * 24 * time.Hour
	// settle is how long a new authority is only trusted before anything is signed by it: until every API
	// server has heard of it.
	settle = 10 * time.Minute
	// backdate allows for clocks that differ.
	backdate = time.Hour
	// certsEvery is how often everything is looked at: a configuration that lost its bundle is mended within.
	certsEvery = 30 * time.Second
)

// Keys of the Secret. What signs is the last authority of the bundle.
const (
	keyBundle       = "ca.crt"
	keyAuthorityKey = "ca.key"
	keyServing      = corev1.TLSCertKey
	keyServingKey   = corev1.TLSPrivateKeyKey
)

// Certs makes the authority and the serving certificate of the webhook, keeps them in a Secret that all
// replicas share, hands the authority to the API servers in the configurations, and replaces both before
// they end.
//
// A new authority is first added to the bundle of every configuration, and signs only after they have had
// time to settle, so that at no time a replica shows a certificate that an API server does not trust.
//
// Every replica does all of it; what two of them do at once ends in a conflict for one, which looks again.
// Concurrency: Run is the one writer; Certificate may be called from anywhere.
type Certs struct {
	Client kclient.Client // reads and writes without a cache: two requests for objects every half minute
	Secret types.NamespacedName
	// Hosts are the names in the serving certificate; the first is its subject.
	Hosts []string
	// Mutating and Validating name the configurations.
	Mutating, Validating []string
	// Now is the clock; nil means time.Now.
	Now    func() time.Time
	Logger *slog.Logger

	serving atomic.Pointer[tls.Certificate]
	shown   []byte // the PEM that serving was made of
}

// Certificate is tls.Config.GetCertificate.
func (c *Certs) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if s := c.serving.Load(); s != nil {
		return s, nil
	}
	return nil, errors.New("there is no certificate yet")
}

// Run keeps everything up to date until ctx ends.
func (c *Certs) Run(ctx context.Context) {
	t := time.NewTicker(certsEvery)
	defer t.Stop()
	for {
		if err := c.Sync(ctx); err != nil && ctx.Err() == nil {
			c.Logger.Error("the webhook's certificate could not be looked after", "secret", c.Secret.String(), "reason", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Sync does what is to be done now.
func (c *Certs) Sync(ctx context.Context) error {
	for range 5 {
		again, err := c.sync(ctx)
		if err != nil && !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			return err
		}
		if err == nil && !again {
			return nil
		}
	}
	return fmt.Errorf("secret %s is changed by somebody else all the time", c.Secret)
}

// sync makes one step; again says that another may follow at once.
func (c *Certs) sync(ctx context.Context) (again bool, err error) {
	now := time.Now
	if c.Now != nil {
		now = c.Now
	}
	secret := &corev1.Secret{}
	err = c.Client.Get(ctx, c.Secret, secret)
	absent := apierrors.IsNotFound(err)
	if err != nil && !absent {
		return false, err
	}
	s, broken := readState(secret.Data)
	if broken != nil {
		s = state{}
	}
	// What is shown is what the Secret holds, before anything else: this replica may be the last to know.
	if broken == nil {
		if err := c.show(secret.Data); err != nil {
			return false, err
		}
		if err := c.trust(ctx, s.bundle()); err != nil {
			return false, err
		}
	}
	changed, why, err := s.renew(now(), c.Hosts)
	if err != nil || !changed {
		return false, err
	}
	secret.Data = s.data()
	if absent {
		secret.ObjectMeta = metav1.ObjectMeta{Namespace: c.Secret.Namespace, Name: c.Secret.Name}
		secret.Type = corev1.SecretTypeTLS
		err = c.Client.Create(ctx, secret)
	} else {
		err = c.Client.Update(ctx, secret)
	}
	if err != nil {
		return false, err
	}
	c.Logger.Info("certificates of the webhook renewed", "secret", c.Secret.String(), "what", why)
	return true, nil
}

// show makes the pair that new connections get.
func (c *Certs) show(data map[string][]byte) error {
	if bytes.Equal(c.shown, data[keyServing]) {
		return nil
	}
	pair, err := tls.X509KeyPair(data[keyServing], data[keyServingKey])
	if err != nil {
		return fmt.Errorf("secret %s: %w", c.Secret, err)
	}
	c.serving.Store(&pair)
	c.shown = data[keyServing]
	return nil
}

// trust writes the bundle into the configurations that do not have it. One that is not there is not ours
// to make.
func (c *Certs) trust(ctx context.Context, bundle []byte) error {
	for _, name := range c.Mutating {
		o := &admissionregistrationv1.MutatingWebhookConfiguration{}
		if err := c.Client.Get(ctx, types.NamespacedName{Name: name}, o); err != nil {
			if apierrors.IsNotFound(err) {
				continue
			}
			return err
		}
		changed := false
		for i := range o.Webhooks {
			changed = setBundle(&o.Webhooks[i].ClientConfig, bundle) || changed
		}
		if changed {
			if err := c.Client.Update(ctx, o); err != nil {
				return err
			}
		}
	}
	for _, name := range c.Validating {
		o := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		if err := c.Client.Get(ctx, types.NamespacedName{Name: name}, o); err != nil {
			if apierrors.IsNotFound(err) {
				continue
			}
			return err
		}
		changed := false
		for i := range o.Webhooks {
			changed = setBundle(&o.Webhooks[i].ClientConfig, bundle) || changed
		}
		if changed {
			if err := c.Client.Update(ctx, o); err != nil {
				return err
			}
		}
	}
	return nil
}

func setBundle(w *admissionregistrationv1.WebhookClientConfig, bundle []byte) bool {
	if bytes.Equal(w.CABundle, bundle) {
		return false
	}
	w.CABundle = bundle
	return true
}

// state is what the Secret holds.
type state struct {
	authorities  []*x509.Certificate // oldest first
	authorityKey *ecdsa.PrivateKey   // of the last
	serving      *x509.Certificate
	servingKey   *ecdsa.PrivateKey
}

// renew makes what must be new now: at most one thing, since what follows from it may have to wait.
func (s *state) renew(now time.Time, hosts []string) (changed bool, why string, err error) {
	if len(s.authorities) == 0 {
		if err := s.newAuthority(now); err != nil {
			return false, "", err
		}
		return true, "first authority and certificate", s.newServing(now, hosts)
	}
	last := s.authorities[len(s.authorities)-1]
	if old(last, now) {
		return true, "authority", s.newAuthority(now)
	}
	settled := len(s.authorities) == 1 || !now.Before(last.NotBefore.Add(backdate+settle)) || now.After(s.serving.NotAfter)
	signer := s.serving.CheckSignatureFrom(last) == nil
	if !settled && signer {
		return false, "", nil
	}
	named := !slices.ContainsFunc(hosts, func(h string) bool { return s.serving.VerifyHostname(h) != nil })
	if settled && (!signer || !named || old(s.serving, now)) {
		return true, "certificate", s.newServing(now, hosts)
	}
	// An authority whose last certificate ended is of no use any more; nor is one that nothing was signed by
	// for as long as a replica may take to hear of it.
	if kept := slices.DeleteFunc(slices.Clone(s.authorities), func(a *x509.Certificate) bool {
		return a != last && (now.After(a.NotAfter) || signer && now.After(s.serving.NotBefore.Add(backdate+settle)))
	}); len(kept) < len(s.authorities) {
		s.authorities = kept
		return true, "an old authority dropped", nil
	}
	return false, "", nil
}

// old says whether a third or less of a certificate's life is left.
func old(c *x509.Certificate, now time.Time) bool {
	return now.After(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3))
}

func (s *state) newAuthority(now time.Time) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		// Each has a subject of its own, or verifiers take one for another.
		Subject:   pkix.Name{CommonName: "stepcache-webhook-ca-" + serial.Text(36)},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	cert, err := sign(t, t, key, key)
	if err != nil {
		return err
	}
	s.authorities, s.authorityKey = append(slices.Clone(s.authorities), cert), key
	return nil
}

func (s *state) newServing(now time.Time, hosts []string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	authority := s.authorities[len(s.authorities)-1]
	end := now.Add(servingLife)
	if end.After(authority.NotAfter) {
		end = authority.NotAfter
	}
	t := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: hosts[0]}, DNSNames: hosts,
		NotBefore: now.Add(-backdate), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	cert, err := sign(t, authority, key, s.authorityKey)
	if err != nil {
		return err
	}
	s.serving, s.servingKey = cert, key
	return nil
}

func sign(t, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key.Public(), parentKey)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// bundle is what an API server must trust.
func (s *state) bundle() []byte {
	var b bytes.Buffer
	for _, a := range s.authorities {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Raw}))
	}
	return b.Bytes()
}

func (s *state) data() map[string][]byte {
	return map[string][]byte{
		keyBundle:       s.bundle(),
		keyAuthorityKey: encodeKey(s.authorityKey),
		keyServing:      pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.serving.Raw}),
		keyServingKey:   encodeKey(s.servingKey),
	}
}

// readState reads a Secret; an error means that it is of no use and all is made anew.
func readState(data map[string][]byte) (state, error) {
	var s state
	for rest := data[keyBundle]; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		a, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return state{}, fmt.Errorf("%s: %w", keyBundle, err)
		}
		s.authorities = append(s.authorities, a)
	}
	if len(s.authorities) == 0 {
		return state{}, fmt.Errorf("%s: no certificate", keyBundle)
	}
	block, _ := pem.Decode(data[keyServing])
	if block == nil {
		return state{}, fmt.Errorf("%s: no certificate", keyServing)
	}
	var err error
	if s.serving, err = x509.ParseCertificate(block.Bytes); err != nil {
		return state{}, fmt.Errorf("%s: %w", keyServing, err)
	}
	if s.servingKey, err = decodeKey(data[keyServingKey]); err != nil {
		return state{}, fmt.Errorf("%s: %w", keyServingKey, err)
	}
	if s.authorityKey, err = decodeKey(data[keyAuthorityKey]); err != nil {
		return state{}, fmt.Errorf("%s: %w", keyAuthorityKey, err)
	}
	last := s.authorities[len(s.authorities)-1]
	if !s.authorityKey.PublicKey.Equal(last.PublicKey) || !s.servingKey.PublicKey.Equal(s.serving.PublicKey) {
		return state{}, errors.New("a key is not its certificate's")
	}
	if !slices.ContainsFunc(s.authorities, func(a *x509.Certificate) bool { return s.serving.CheckSignatureFrom(a) == nil }) {
		return state{}, errors.New("the certificate is signed by none of the authorities")
	}
	return s, nil
}

func encodeKey(k *ecdsa.PrivateKey) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		panic(err) // only of a key of an unknown kind
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func decodeKey(b []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("no key")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	e, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a key of kind %T", k)
	}
	return e, nil
}
