package network

import (
	"context"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filterPriority is tc's preference; 1 comes before every other filter.
const filterPriority = 1

// ingressParent is where filters on arriving frames hang, for an ingress and for a clsact qdisc.
var ingressParent = netlink.MakeHandle(0xffff, 0xfff2)

// redirect sends every frame that arrives at the link from out of the link to. It says whether it
// made the ingress qdisc, also when it fails after that.
func redirect(ctx context.Context, h *netlink.Handle, from, to int) (madeQdisc bool, err error) {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}}
	err = retry(ctx, func() error { return h.QdiscAdd(qdisc) })
	switch {
	case err == nil:
		madeQdisc = true
	case errors.Is(err, unix.EEXIST):
		// An ingress or clsact qdisc of the CNI plugin, or one that an earlier attempt left.
	default:
		return false, fmt.Errorf("adding the ingress qdisc: %w", err)
	}
	if !madeQdisc {
		if done, err := dropStale(h, from, to); done || err != nil {
			return false, err
		}
	}
	if err := retry(ctx, func() error { return h.FilterAdd(redirectFilter(from, to)) }); err != nil {
		return madeQdisc, fmt.Errorf("adding the u32 filter with the action mirred: %w", err)
	}
	return madeQdisc, nil
}

// dropStale removes the filters that an earlier attempt left on a link: they redirect to a tap that
// is gone, and swallow what they match. (The kernel adds a second u32 filter behind them without
// a word.) One that redirects to the link to already is left: done. Anybody else's filter of the same
// priority is an error.
func dropStale(h *netlink.Handle, index, to int) (done bool, err error) {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	filters, err := dump(func() ([]netlink.Filter, error) { return h.FilterList(link, ingressParent) })
	if err != nil {
		return false, fmt.Errorf("listing the filters: %w", err)
	}
	stale := false
	for _, f := range filters {
		if f.Attrs().Priority != filterPriority {
			continue
		}
		u32, ok := f.(*netlink.U32)
		switch {
		case ok && redirectsTo(u32, to):
			done = true
		case ok && redirectsNowhere(u32):
			stale = true
		default:
			return false, fmt.Errorf("a filter of kind %s with priority %d is there already: %w", f.Type(), filterPriority, unix.EEXIST)
		}
	}
	if done || !stale {
		return done, nil
	}
	// Without a handle all filters of the priority go.
	if err := h.FilterDel(redirectFilter(index, 0)); err != nil && !notFound(err) {
		return false, fmt.Errorf("removing the filter of an earlier attempt: %w", err)
	}
	return false, nil
}

// redirectsTo says that a filter is what redirect makes.
func redirectsTo(f *netlink.U32, to int) bool {
	if len(f.Actions) != 1 {
		return false
	}
	m, ok := f.Actions[0].(*netlink.MirredAction)
	return ok && m.Ifindex == to
}

// redirectsNowhere says that every action of a filter leads to an interface that is gone. The hash
// table that the kernel lists before the filters of u32 has no action at all.
func redirectsNowhere(f *netlink.U32) bool {
	for _, action := range f.Actions {
		if m, ok := action.(*netlink.MirredAction); !ok || m.Ifindex != 0 {
			return false
		}
	}
	return f.RedirIndex == 0
}

func redirectFilter(from, to int) *netlink.U32 {
	return &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from,
			Parent:    ingressParent,
			Priority:  filterPriority,
			Protocol:  unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to)},
	}
}

// unredirect takes off p's interface what redirect put there. The tap's goes with the tap.
func unredirect(h *netlink.Handle, p port) error {
	link, err := h.LinkByName(p.Interface)
	if err != nil {
		if notFound(err) {
			return nil
		}
		return err
	}
	index := link.Attrs().Index
	if p.Qdisc {
		err = h.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: index,
			Handle:    netlink.MakeHandle(0xffff, 0),
			Parent:    netlink.HANDLE_INGRESS,
		}})
	} else {
		err = h.FilterDel(redirectFilter(index, 0))
	}
	if err != nil && !notFound(err) {
		return err
	}
	return nil
}

// notFound says that what was to be removed is not there; tc answers EINVAL for an absent qdisc.
func notFound(err error) bool {
	var gone netlink.LinkNotFoundError
	return errors.As(err, &gone) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}
