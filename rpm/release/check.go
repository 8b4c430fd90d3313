package release

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"kuasar.io/kuasar/ci/build"
	"kuasar.io/kuasar/ci/host"
	"kuasar.io/kuasar/rpm"
)

// Check makes the package of what the tree has built already, twice, which must yield the same bytes, and
// lets rpmlint look at it.
func Check(ctx context.Context, tree build.Tree, out io.Writer) error {
	if err := host.Ensure(ctx, host.Inspect); err != nil {
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
	if err := describe(path, out); err != nil {
		return err
	}
	scratch, err := os.MkdirTemp("", "kuasar-check-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	o.Output = scratch
	again, err := rpm.Build(ctx, o)
	if err != nil {
		return err
	}
	if err := same(path, again); err != nil {
		return err
	}
	findings, err := rpm.Lint(ctx, path)
	if err != nil {
		return err
	}
	if findings != "" {
		return fmt.Errorf("rpmlint finds fault with %s:\n%s", path, findings)
	}
	fmt.Fprintln(out, "  the same bytes when built again; nothing found by rpmlint")
	return nil
}

func same(a, b string) error {
	first, err := os.ReadFile(a)
	if err != nil {
		return err
	}
	second, err := os.ReadFile(b)
	if err != nil {
		return err
	}
	if !bytes.Equal(first, second) {
		return errors.New("the package is not the same bytes when it is built again; did the source or out/ change meanwhile?")
	}
	return nil
}
