// The command ping sends ICMP echo requests and counts the replies to them, IPv4 and IPv6.
//
//	ping [-4|-6] [-c COUNT] [-i SECONDS] [-W SECONDS] [-s BYTES] HOST
//
// It exits with 0 if a reply came, 1 if none did, 2 if it could not send.
package main

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"net"
	"os"
	"os/signal"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

var (
	only4    = flag.Bool("4", false, "use IPv4 only")
	only6    = flag.Bool("6", false, "use IPv6 only")
	count    = flag.Int("c", 0, "stop after this many requests (0: when interrupted)")
	interval = flag.Float64("i", 1, "seconds between requests")
	patience = flag.Float64("W", 2, "seconds to wait for a reply")
	size     = flag.Int("s", 56, "bytes of data in a request")
)

func main() {
	flag.Parse()
	if flag.NArg() != 1 || *size < 0 || *size > 65000 {
		fmt.Fprintln(os.Stderr, "usage: ping [-4|-6] [-c COUNT] [-i SECONDS] [-W SECONDS] [-s BYTES] HOST")
		os.Exit(2)
	}
	received, err := ping(flag.Arg(0))
	if err != nil {
		fmt.Fprintf(os.Stderr, "ping: %v\n", err)
		os.Exit(2)
	}
	if received == 0 {
		os.Exit(1)
	}
}

// A family is what differs between IPv4 and IPv6.
type family struct {
	network, listen string
	protocol        int
	request, reply  icmp.Type
}

var (
	v4 = family{"ip4:icmp", "0.0.0.0", 1, ipv4.ICMPTypeEcho, ipv4.ICMPTypeEchoReply}
	v6 = family{"ip6:ipv6-icmp", "::", 58, ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply}
)

func ping(host string) (received int, err error) {
	network := "ip"
	switch {
	case *only4:
		network = "ip4"
	case *only6:
		network = "ip6"
	}
	address, err := net.ResolveIPAddr(network, host)
	if err != nil {
		return 0, err
	}
	f := v6
	if address.IP.To4() != nil {
		f = v4
	}
	conn, err := icmp.ListenPacket(f.network, f.listen)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt)

	fmt.Printf("PING %s (%s) %d bytes of data.\n", host, address, *size)
	sent, id := 0, os.Getpid()&0xffff
	stop := false
	for !stop {
		begun := time.Now()
		sent++
		took, err := echo(conn, f, address, id, sent&0xffff)
		switch {
		case err == nil:
			received++
			fmt.Printf("%d bytes from %s: icmp_seq=%d time=%.3f ms\n", *size+8, address, sent, float64(took.Microseconds())/1000)
		case errors.Is(err, os.ErrDeadlineExceeded):
			fmt.Printf("no reply from %s: icmp_seq=%d\n", address, sent)
		default:
			return received, err
		}
		if *count > 0 && sent >= *count {
			break
		}
		select {
		case <-interrupted:
			stop = true
		case <-time.After(seconds(*interval) - time.Since(begun)):
		}
	}
	fmt.Printf("\n--- %s ping statistics ---\n%d packets transmitted, %d received, %.0f%% packet loss\n",
		host, sent, received, math.Round(100*float64(sent-received)/float64(sent)))
	return received, nil
}

// echo sends one request and waits for its own reply: the socket also sees those of others and, on
// the loopback interface, the request itself.
func echo(conn *icmp.PacketConn, f family, to net.Addr, id, seq int) (took time.Duration, err error) {
	request, err := (&icmp.Message{Type: f.request, Body: &icmp.Echo{ID: id, Seq: seq, Data: make([]byte, *size)}}).Marshal(nil)
	if err != nil {
		return 0, err
	}
	begun := time.Now()
	if _, err := conn.WriteTo(request, to); err != nil {
		return 0, err
	}
	if err := conn.SetReadDeadline(begun.Add(seconds(*patience))); err != nil {
		return 0, err
	}
	packet := make([]byte, 1<<16)
	for {
		n, _, err := conn.ReadFrom(packet)
		if err != nil {
			return 0, err
		}
		message, err := icmp.ParseMessage(f.protocol, packet[:n])
		if err != nil || message.Type != f.reply {
			continue
		}
		if body, ok := message.Body.(*icmp.Echo); ok && body.ID == id && body.Seq == seq {
			return time.Since(begun), nil
		}
	}
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
