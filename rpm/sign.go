package rpm

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// signer returns what signs a package with an armored private key, given as text or as the path of a
// file; nil for no key. The signature's time is at, or that of the key if it is younger: a signature from
// before its key is none. RSA's and EdDSA's signatures of the same data at the same time
// are the same bytes; keys of other kinds are refused.
func signer(key, passphrase string, at time.Time) (func(io.Reader) ([]byte, error), error) {
	if key == "" {
		return nil, nil
	}
	entity, err := readKey(key, passphrase)
	if err != nil {
		return nil, fmt.Errorf("cannot use RPM_SIGNING_KEY: %w", err)
	}
	if t := valid(entity); t.After(at) {
		at = t
	}
	signing, ok := entity.SigningKey(at)
	if !ok {
		return nil, fmt.Errorf("cannot use RPM_SIGNING_KEY: no key in it may sign on %s", at.UTC().Format(time.DateOnly))
	}
	switch signing.PublicKey.PubKeyAlgo {
	case packet.PubKeyAlgoRSA, packet.PubKeyAlgoRSASignOnly, packet.PubKeyAlgoEdDSA:
	default:
		return nil, errors.New("cannot use RPM_SIGNING_KEY: it is neither RSA nor EdDSA; RPM verifies those, and their signatures are reproducible")
	}
	noSalt := false
	config := &packet.Config{
		DefaultHash:                           crypto.SHA256,
		Time:                                  func() time.Time { return at },
		NonDeterministicSignaturesViaNotation: &noSalt,
	}
	return func(data io.Reader) ([]byte, error) {
		var signature bytes.Buffer
		if err := openpgp.DetachSign(&signature, entity, data, config); err != nil {
			return nil, fmt.Errorf("cannot sign: %w", err)
		}
		return signature.Bytes(), nil
	}, nil
}

func readKey(key, passphrase string) (*openpgp.Entity, error) {
	from := "its text"
	if !strings.Contains(key, "-----BEGIN ") {
		from = key
		text, err := os.ReadFile(key)
		if err != nil {
			return nil, fmt.Errorf("it is neither an armored key nor a readable file: %w", err)
		}
		key = string(text)
	}
	ring, err := openpgp.ReadArmoredKeyRing(strings.NewReader(key))
	if err != nil {
		return nil, fmt.Errorf("%s holds no armored key: %w", from, err)
	}
	if len(ring) != 1 {
		return nil, fmt.Errorf("%s holds %d keys instead of one", from, len(ring))
	}
	entity := ring[0]
	if entity.PrivateKey == nil {
		return nil, fmt.Errorf("%s holds a public key only", from)
	}
	if locked(entity) {
		if passphrase == "" {
			return nil, errors.New("it is locked, and RPM_SIGNING_PASSPHRASE is not set")
		}
		if err := entity.DecryptPrivateKeys([]byte(passphrase)); err != nil {
			return nil, fmt.Errorf("RPM_SIGNING_PASSPHRASE does not unlock it: %w", err)
		}
	}
	return entity, nil
}

func locked(e *openpgp.Entity) bool {
	if e.PrivateKey.Encrypted {
		return true
	}
	for _, k := range e.Subkeys {
		if k.PrivateKey != nil && k.PrivateKey.Encrypted {
			return true
		}
	}
	return false
}

// valid returns when the last of a key's parts was made: before, the key as it is now could not sign.
func valid(e *openpgp.Entity) time.Time {
	last := e.PrimaryKey.CreationTime
	later := func(t time.Time) {
		if t.After(last) {
			last = t
		}
	}
	for _, id := range e.Identities {
		if id.SelfSignature != nil {
			later(id.SelfSignature.CreationTime)
		}
	}
	for _, k := range e.Subkeys {
		later(k.PublicKey.CreationTime)
		if k.Sig != nil {
			later(k.Sig.CreationTime)
		}
	}
	return last
}

// PublicKey returns the armored public key that belongs to a private one, which is given as in Options.
// It is what administrators import to verify packages.
func PublicKey(key, passphrase string) (string, error) {
	entity, err := readKey(key, passphrase)
	if err != nil {
		return "", fmt.Errorf("cannot use RPM_SIGNING_KEY: %w", err)
	}
	return enarmor(openpgp.PublicKeyType, entity.Serialize)
}

// Sign returns an armored signature of data, by a private key that is given as in Options.
func Sign(key, passphrase string, at time.Time, data []byte) (string, error) {
	sign, err := signer(key, passphrase, at)
	if err != nil {
		return "", err
	}
	if sign == nil {
		return "", errors.New("no key is given")
	}
	signature, err := sign(bytes.NewReader(data))
	if err != nil {
		return "", err
	}
	return enarmor(openpgp.SignatureType, func(w io.Writer) error {
		_, err := w.Write(signature)
		return err
	})
}

// enarmor returns what write writes in ASCII armor.
func enarmor(kind string, write func(io.Writer) error) (string, error) {
	var text strings.Builder
	w, err := armor.Encode(&text, kind, nil)
	if err != nil {
		return "", err
	}
	if err := errors.Join(write(w), w.Close()); err != nil {
		return "", err
	}
	return text.String() + "\n", nil
}
