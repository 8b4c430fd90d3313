package rpm

import (
	"bytes"
	"crypto"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// key makes an armored private key that was made at a time, locked if there is a passphrase.
func key(t *testing.T, at time.Time, algorithm packet.PublicKeyAlgorithm, passphrase string) string {
	t.Helper()
	config := &packet.Config{Algorithm: algorithm, RSABits: 2048, DefaultHash: crypto.SHA256, Time: func() time.Time { return at }}
	if algorithm == packet.PubKeyAlgoECDSA {
		config.Curve = packet.CurveNistP256
	}
	entity, err := openpgp.NewEntity("Kuasar", "tests", "kuasar@kuasar.io", config)
	if err != nil {
		t.Fatal(err)
	}
	if passphrase != "" {
		if err := entity.EncryptPrivateKeys([]byte(passphrase), config); err != nil {
			t.Fatal(err)
		}
	}
	var text strings.Builder
	w, err := armor.Encode(&text, openpgp.PrivateKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := entity.SerializePrivateWithoutSigning(w, config); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// verify checks both signatures of a package as of a time and returns when they were made.
func verify(t *testing.T, path, public string, now time.Time) time.Time {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	ring, err := openpgp.ReadArmoredKeyRing(strings.NewReader(public))
	if err != nil {
		t.Fatal(err)
	}
	s, err := split(data)
	if err != nil {
		t.Fatal(err)
	}
	var made time.Time
	check := func(signed io.Reader, signature []byte) error {
		sig, _, err := openpgp.VerifyDetachedSignature(ring, signed, bytes.NewReader(signature), &packet.Config{Time: func() time.Time { return now }})
		if err == nil {
			made = sig.CreationTime
		}
		return err
	}
	header, whole := s.signed()
	if err := check(header, s.headerSignature); err != nil {
		t.Errorf("the header's signature: %v", err)
	}
	if err := check(whole, s.packageSignature); err != nil {
		t.Errorf("the package's signature: %v", err)
	}
	s.payload[0] ^= 1
	_, whole = s.signed()
	if err := check(whole, s.packageSignature); err == nil {
		t.Error("the signature holds for another payload")
	}
	return made
}

func TestSigned(t *testing.T) {
	o := tree(t, t.TempDir())
	o.SigningKey = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(o.SigningKey, []byte(key(t, epoch.AddDate(-1, 0, 0), packet.PubKeyAlgoRSA, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	path, sum := mustBuild(t, o)
	if signed, err := Signed(path); err != nil || !signed {
		t.Errorf("signed: %v, %v", signed, err)
	}
	public, err := PublicKey(o.SigningKey, "")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(public, "PRIVATE") {
		t.Error("the public key is a private one")
	}
	if made := verify(t, path, public, epoch.AddDate(1, 0, 0)); !made.Equal(epoch) {
		t.Errorf("signed at %v, not at %v", made, epoch)
	}
	o.Output = t.TempDir()
	if _, other := mustBuild(t, o); other != sum {
		t.Error("another package when built again")
	}
}

func TestKeys(t *testing.T) {
	before, after := epoch.AddDate(-1, 0, 0), epoch.AddDate(1, 0, 0)
	for name, c := range map[string]struct {
		key, passphrase string
		made            time.Time
	}{
		"RSA":                       {key(t, before, packet.PubKeyAlgoRSA, ""), "", epoch},
		"EdDSA":                     {key(t, before, packet.PubKeyAlgoEdDSA, ""), "", epoch},
		"locked":                    {key(t, before, packet.PubKeyAlgoRSA, "open sesame"), "open sesame", epoch},
		"younger than the packaged": {key(t, after, packet.PubKeyAlgoRSA, ""), "", after},
	} {
		t.Run(name, func(t *testing.T) {
			signature, err := Sign(c.key, c.passphrase, epoch, []byte("header"))
			if err != nil {
				t.Fatal(err)
			}
			if again, err := Sign(c.key, c.passphrase, epoch, []byte("header")); again != signature || err != nil {
				t.Errorf("another signature of the same data (%v)", err)
			}
			public, err := PublicKey(c.key, c.passphrase)
			if err != nil {
				t.Fatal(err)
			}
			ring, err := openpgp.ReadArmoredKeyRing(strings.NewReader(public))
			if err != nil {
				t.Fatal(err)
			}
			later := &packet.Config{Time: func() time.Time { return after.AddDate(1, 0, 0) }}
			block, err := armor.Decode(strings.NewReader(signature))
			if err != nil {
				t.Fatal(err)
			}
			sig, _, err := openpgp.VerifyDetachedSignature(ring, strings.NewReader("header"), block.Body, later)
			if err != nil || !sig.CreationTime.Equal(c.made) {
				t.Errorf("%+v, %v; want one of %v", sig, err, c.made)
			}
		})
	}
}

func TestNoPackage(t *testing.T) {
	if signed, err := Signed(os.Args[0]); err == nil {
		t.Errorf("a program passes for a package, signed %v", signed)
	}
}

func TestUnusableKeys(t *testing.T) {
	locked := key(t, epoch, packet.PubKeyAlgoRSA, "open sesame")
	good := key(t, epoch, packet.PubKeyAlgoRSA, "")
	public, err := PublicKey(good, "")
	if err != nil {
		t.Fatal(err)
	}
	for want, c := range map[string][2]string{
		"neither an armored key nor a readable file": {"/no/such/key", ""},
		"RPM_SIGNING_PASSPHRASE is not set":          {locked, ""},
		"does not unlock it":                         {locked, "open barley"},
		"public key only":                            {public, ""},
		"holds no armored key":                       {"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nAAAA\n-----END PGP PRIVATE KEY BLOCK-----\n", ""},
		"neither RSA nor EdDSA":                      {key(t, epoch, packet.PubKeyAlgoECDSA, ""), ""},
	} {
		if _, err := signer(c[0], c[1], epoch); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}
