// Package release makes the package of a source tree, and the repository that dnf installs it from.
package release

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"kuasar.io/kuasar/ci/build"
	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/rpm"
)

// Folder is where packages and the repository's metadata are put, below the tree's out/.
const Folder = "rpm"

// Key is the signing key, from RPM_SIGNING_KEY and RPM_SIGNING_PASSPHRASE in the environment. Its zero
// value signs nothing.
type Key struct {
	private, passphrase string
}

// EnvironmentKey returns the key that the environment has.
func EnvironmentKey() Key {
	return Key{os.Getenv("RPM_SIGNING_KEY"), os.Getenv("RPM_SIGNING_PASSPHRASE")}
}

func (k Key) there() bool { return k.private != "" }

// Package builds what is in the package and then the package, of release RELEASE in the environment, and
// says on out where it is. It needs neither root nor RPM's tools.
func Package(ctx context.Context, tree build.Tree, out io.Writer) error {
	if err := tree.Everything(ctx); err != nil {
		return err
	}
	o, err := Options(ctx, tree)
	if err != nil {
		return err
	}
	path, err := rpm.Build(ctx, o)
	if err != nil {
		return err
	}
	return describe(path, out)
}

// Options are those of the package of what the tree has built already.
func Options(ctx context.Context, tree build.Tree) (rpm.Options, error) {
	texts, err := texts(ctx)
	if err != nil {
		return rpm.Options{}, fmt.Errorf("cannot build the package: %w", err)
	}
	version, commit, committed := tree.Stamp(ctx)
	key := EnvironmentKey()
	return rpm.Options{
		Root: tree.Root, Arch: tree.Architecture(), Version: version, Release: os.Getenv("RELEASE"), Commit: commit, Time: committed,
		Sandboxer: tree.Path(build.Sandboxer), Ctl: tree.Path(build.Ctl), Kernel: tree.Path(build.Kernel), Initrd: tree.Path(build.Initrd),
		Libraries:  rpm.HostLibraries(ctx, tree.Architecture()),
		Texts:      texts,
		SigningKey: key.private, SigningPassphrase: key.passphrase,
		Output: folder(tree),
	}, nil
}

// texts asks the go command where licences are.
func texts(ctx context.Context) (rpm.Texts, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMODCACHE", "GOROOT").Output()
	if err != nil {
		return rpm.Texts{}, fmt.Errorf("go env: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) != 2 {
		return rpm.Texts{}, fmt.Errorf("go env tells %q instead of two folders", lines)
	}
	return rpm.Texts{Modules: lines[0], Go: lines[1], Common: rpm.CommonTexts}, nil
}

func folder(tree build.Tree) string { return filepath.Join(tree.Root, build.Out, Folder) }

// describe says what a package is.
func describe(path string, out io.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	digest := sha256.New()
	size, err := io.Copy(digest, f)
	if err != nil {
		return err
	}
	signed, err := rpm.Signed(path)
	if err != nil {
		return err
	}
	signature := "not signed (RPM_SIGNING_KEY is not set)"
	if signed {
		signature = "signed"
	}
	fmt.Fprintf(out, "%s\n  %.1f MB, %s\n  sha256 %s\n", path, float64(size)/1e6, signature, hex.EncodeToString(digest.Sum(nil)))
	return nil
}

// Repo makes the packages in out/rpm a repository and says on out what a node needs to install from it.
func Repo(ctx context.Context, tree build.Tree, out io.Writer) error {
	dir, err := filepath.Abs(folder(tree))
	if err != nil {
		return err
	}
	packages, err := filepath.Glob(filepath.Join(dir, "*.rpm"))
	if err != nil {
		return err
	}
	if len(packages) == 0 {
		return fmt.Errorf("cannot make a repository: there is no package in %s; \"go tool mage package\" makes one", dir)
	}
	if err := host.Ensure(ctx, host.Repository); err != nil {
		return err
	}
	version, _, committed := tree.Stamp(ctx)
	if committed.IsZero() {
		return fmt.Errorf("cannot make a repository: the time of what is packaged is not known: set SOURCE_DATE_EPOCH or build in a repository")
	}
	// With the time of the source as revision, the same packages have the same metadata. dnf looks at the
	// checksums in it too, so that other packages of the same time are noticed.
	revision := fmt.Sprint(committed.Unix())
	cmd := exec.CommandContext(ctx, "createrepo_c", "--quiet", "--no-database", "--workers=1",
		"--revision="+revision, "--set-timestamp-to-revision", dir)
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cannot make a repository of %s: createrepo_c: %w\n%s", dir, err, strings.TrimSpace(string(text)))
	}
	r := repository{dir: dir, version: version, packages: packages}
	if err := r.sign(EnvironmentKey(), committed); err != nil {
		return err
	}
	return r.describe(out)
}

// repository is a folder with packages and metadata.
type repository struct {
	dir, version string
	packages     []string
	signed       bool // the metadata are, and the public key is in the folder
}

// Names of files in a repository.
const (
	publicKey = "RPM-GPG-KEY-kuasar"
	metadata  = "repodata/repomd.xml"
	snippet   = "kuasar.repo"
)

// unsigned returns the packages without a signature.
func (r repository) unsigned() ([]string, error) {
	var list []string
	for _, p := range r.packages {
		signed, err := rpm.Signed(p)
		if err != nil {
			return nil, err
		}
		if !signed {
			list = append(list, filepath.Base(p))
		}
	}
	return list, nil
}

// describe writes the file that dnf needs of the repository, and shows it.
func (r repository) describe(out io.Writer) error {
	unsigned, err := r.unsigned()
	if err != nil {
		return err
	}
	text := r.configuration(len(unsigned) == 0)
	path := filepath.Join(r.dir, snippet)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		return fmt.Errorf("cannot make a repository: %w", err)
	}
	fmt.Fprintf(out, "%s: a repository of %d packages\n", r.dir, len(r.packages))
	if r.signed && len(unsigned) > 0 {
		slices.Sort(unsigned)
		fmt.Fprintf(out, "not signed, so that dnf is told not to check: %s\n", strings.Join(unsigned, " "))
	}
	fmt.Fprintf(out, "%s, for /etc/yum.repos.d of a node that can read this folder (else change baseurl):\n\n%s\n", path, text)
	fmt.Fprintf(out, "Then: yum install kuasar && systemctl restart kuasar-vmm\n")
	return nil
}

// configuration is the file for /etc/yum.repos.d.
func (r repository) configuration(allSigned bool) string {
	lines := []string{
		"[kuasar]",
		"name=Kuasar",
		"baseurl=file://" + r.dir,
		"enabled=1",
	}
	switch {
	case r.signed && allSigned:
		lines = append(lines, "gpgcheck=1", "repo_gpgcheck=1", "gpgkey=file://"+filepath.Join(r.dir, publicKey))
	case r.signed:
		lines = append(lines, "gpgcheck=0", "repo_gpgcheck=1", "gpgkey=file://"+filepath.Join(r.dir, publicKey))
	default:
		lines = append(lines, "gpgcheck=0")
	}
	return strings.Join(lines, "\n") + "\n"
}
