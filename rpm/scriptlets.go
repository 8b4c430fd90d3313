package rpm

import (
	"embed"

	"github.com/goreleaser/nfpm/v2"
)

//go:embed scriptlets/*.sh
var scriptletFiles embed.FS

// scriptlets returns what RPM runs before and after it installs or erases. Their interpreter is /bin/sh,
// whatever that is; $1 is how many of the package will be installed afterwards.
func (p pack) scriptlets() (nfpm.Scripts, error) {
	var s nfpm.Scripts
	for name, path := range map[string]*string{
		"pre": &s.PreInstall, "post": &s.PostInstall, "preun": &s.PreRemove, "postun": &s.PostRemove,
	} {
		text, err := scriptletFiles.ReadFile("scriptlets/" + name + ".sh")
		if err != nil {
			return s, err
		}
		if *path, err = p.file(name, text); err != nil {
			return s, err
		}
	}
	return s, nil
}
