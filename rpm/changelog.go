package rpm

import (
	"encoding/json"
	"strings"
	"time"
)

// history is what changed for administrators, the newest version first. The first entry is of the version
// that is being worked on, and needs no date: it gets that of the package.
var history = []release{
	{
		version: "0.1.0",
		notes: []string{
			"First package: the service kuasar-vmm, which runs pods of containerd 2.x in virtual machines on QEMU",
			"A restart, a crash and an upgrade of the daemon leave pods running and the engine's connections open",
		},
	},
}

type release struct {
	version string
	date    time.Time
	notes   []string
}

// changelog writes the changelog for nfpm and returns its path.
func (p pack) changelog() (string, error) {
	text, err := json.Marshal(changes(history, p.evr, p.Commit, p.Time))
	if err != nil {
		return "", err
	}
	return p.file("changelog.yml", text)
}

// An entry is one of the changelog, as nfpm reads it: as YAML, of which JSON is a part.
type entry struct {
	Version  string    `json:"semver"`
	Date     time.Time `json:"date"`
	Packager string    `json:"packager"`
	Changes  []change  `json:"changes"`
}

type change struct {
	Note string `json:"note"`
}

// changes returns the history up to the package that is built, whose entry comes first: the notes of its
// version, if history has them, else where it comes from.
func changes(history []release, evr, commit string, at time.Time) []entry {
	// 0.1.0~dev-1 is on the way to 0.1.0.
	version, _, _ := strings.Cut(evr, "-")
	version, _, _ = strings.Cut(version, "~")
	if len(history) == 0 || history[0].version != version {
		note := "Built from a source whose commit is not known"
		if commit != "" {
			note = "Built from commit " + commit
		}
		history = append([]release{{notes: []string{note}}}, history...)
	}
	var list []entry
	for i, r := range history {
		e := entry{Version: r.version + "-1", Date: r.date.UTC(), Packager: packager}
		// What is being worked on has no date of its own.
		if i == 0 || r.date.IsZero() {
			e.Date = at.UTC()
		}
		if i == 0 {
			e.Version = evr
		}
		for _, note := range r.notes {
			e.Changes = append(e.Changes, change{note})
		}
		list = append(list, e)
	}
	return list
}
