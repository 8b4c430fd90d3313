package release

import (
	"crypto"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/goreleaser/nfpm/v2"
	_ "github.com/goreleaser/nfpm/v2/rpm"

	"kuasar.io/kuasar/ci/build"
)

func signingKey(t *testing.T) string {
	t.Helper()
	made := func() time.Time { return time.Unix(1000, 0) }
	entity, err := openpgp.NewEntity("Kuasar", "tests", "kuasar@kuasar.io", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, DefaultHash: crypto.SHA256, Time: made})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	w, err := armor.Encode(&text, openpgp.PrivateKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := entity.SerializePrivateWithoutSigning(w, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// empty writes a package without files into dir and returns its path.
func empty(t *testing.T, dir, version string) string {
	t.Helper()
	at := time.Unix(1, 0)
	info := nfpm.WithDefaults(&nfpm.Info{
		Name: "kuasar", Arch: "all", Version: version, VersionSchema: "none", Release: "1", Description: "Stands in.", MTime: at,
		Overridables: nfpm.Overridables{RPM: nfpm.RPM{BuildHost: "localhost"}},
	})
	format, err := nfpm.Get("rpm")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, format.ConventionalFileName(info))
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(format.Package(info, f), f.Close(), os.Chtimes(path, at, at)); err != nil {
		t.Fatal(err)
	}
	return path
}

// metadataOf makes a folder with one package and metadata.
func metadataOf(t *testing.T) repository {
	t.Helper()
	dir := t.TempDir()
	packages := []string{empty(t, dir, "1")}
	if err := os.MkdirAll(filepath.Join(dir, "repodata"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, metadata), []byte("<repomd/>\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return repository{dir: dir, packages: packages}
}

func TestSignedMetadata(t *testing.T) {
	r := metadataOf(t)
	if err := r.sign(Key{private: signingKey(t)}, time.Unix(5000, 0)); err != nil {
		t.Fatal(err)
	}
	public, err := os.Open(filepath.Join(r.dir, publicKey))
	if err != nil {
		t.Fatal(err)
	}
	defer public.Close()
	ring, err := openpgp.ReadArmoredKeyRing(public)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := os.ReadFile(filepath.Join(r.dir, metadata+".asc"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := openpgp.CheckArmoredDetachedSignature(ring, strings.NewReader("<repomd/>\n"), strings.NewReader(string(signature)), nil); err != nil {
		t.Errorf("the signature does not hold: %v", err)
	}

	// Its package is not signed, which dnf must know.
	var out strings.Builder
	if err := r.describe(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"gpgcheck=0\nrepo_gpgcheck=1\n", "gpgkey=file://" + filepath.Join(r.dir, publicKey), "not signed, so that dnf is told not to check: kuasar-1-1."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q lacks %q", out.String(), want)
		}
	}
	if got := r.configuration(true); !strings.Contains(got, "\ngpgcheck=1\nrepo_gpgcheck=1\n") {
		t.Errorf("%q", got)
	}

	// Without a key the next time, no signature of other metadata stays.
	if err := r.sign(Key{}, time.Unix(6000, 0)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{publicKey, metadata + ".asc"} {
		if _, err := os.Stat(filepath.Join(r.dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSnippet(t *testing.T) {
	r := metadataOf(t)
	var out strings.Builder
	if err := r.describe(&out); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(r.dir, snippet))
	if err != nil {
		t.Fatal(err)
	}
	want := "[kuasar]\nname=Kuasar\nbaseurl=file://" + r.dir + "\nenabled=1\ngpgcheck=0\n"
	if string(text) != want || !strings.Contains(out.String(), want) {
		t.Errorf("%q, shown %q; want %q", text, out.String(), want)
	}
}

func TestRepositoryOfNothing(t *testing.T) {
	err := Repo(t.Context(), build.Tree{Root: t.TempDir()}, os.Stdout)
	if err == nil || !strings.Contains(err.Error(), `"go tool mage package" makes one`) {
		t.Errorf("%v", err)
	}
}

func TestRepo(t *testing.T) {
	if _, err := exec.LookPath("createrepo_c"); err != nil {
		t.Skip("needs createrepo_c")
	}
	t.Setenv("RPM_SIGNING_KEY", "")
	t.Setenv("SOURCE_DATE_EPOCH", "86400")
	made := func() string {
		root := t.TempDir()
		dir := filepath.Join(root, build.Out, Folder)
		empty(t, dir, "1")
		empty(t, dir, "2")
		var out strings.Builder
		if err := Repo(t.Context(), build.Tree{Root: root}, &out); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), "a repository of 2 packages") {
			t.Errorf("%q", out.String())
		}
		text, err := os.ReadFile(filepath.Join(dir, metadata))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	first := made()
	if !strings.Contains(first, "<revision>86400</revision>") {
		t.Errorf("the revision is not the time of the source:\n%s", first)
	}
	if strings.Contains(first, "primary_db") {
		t.Error("there are databases, which nobody reads any more")
	}
	if made() != first {
		t.Error("other metadata of the same packages in another folder")
	}
}
