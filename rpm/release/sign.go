package release

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kuasar.io/kuasar/rpm"
)

// sign signs the metadata, which hold the checksums of all packages, and puts the public key beside the
// packages. Without a key, what an earlier run signed is removed, for it would not hold any more.
func (r *repository) sign(key Key, at time.Time) error {
	signature, public := filepath.Join(r.dir, metadata+".asc"), filepath.Join(r.dir, publicKey)
	if !key.there() {
		for _, path := range []string{signature, public} {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("cannot make a repository: %w", err)
			}
		}
		return nil
	}
	text, err := os.ReadFile(filepath.Join(r.dir, metadata))
	if err != nil {
		return fmt.Errorf("cannot sign the repository: %w", err)
	}
	armored, err := rpm.Sign(key.private, key.passphrase, at, text)
	if err != nil {
		return fmt.Errorf("cannot sign the repository: %w", err)
	}
	own, err := rpm.PublicKey(key.private, key.passphrase)
	if err != nil {
		return err
	}
	for path, text := range map[string]string{signature: armored, public: own} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("cannot sign the repository: %w", err)
		}
	}
	r.signed = true
	return nil
}
