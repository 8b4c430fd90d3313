// Package qmp is a client of the QEMU Machine Protocol, for QEMU and for StratoVirt, whose servers
// differ in what they forgive. It keeps to what the stricter of both accepts: ids are strings, a
// request is one JSON document in one write, and there is never more than one request under way.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// maxRequest is the longest document that StratoVirt reads, in bytes.
	maxRequest = 8192
	// maxReply bounds one line of the server, in bytes. Nobody here asks for more than lists of
	// devices.
	maxReply = 256 << 10
	// writeTimeout bounds the write of one request: the server reads at once or not at all.
	writeTimeout = 5 * time.Second
	// StratoVirt throws requests away beyond 100 in a second; half of that is always enough.
	maxPerPeriod   = 50
	throttlePeriod = time.Second
)

// Error is the server's refusal of a command.
type Error struct {
	Command string
	// Class is the server's: GenericError, CommandNotFound, DeviceNotFound, ...
	Class string
	Desc  string
}

func (e *Error) Error() string {
	desc := e.Desc
	if desc == "" {
		desc = "refused without a reason"
	}
	return fmt.Sprintf("QMP %s: %s (%s)", e.Command, desc, e.Class)
}

// Event is something that happened in the machine.
type Event struct {
	Name string
	Data json.RawMessage
}

// Client is a connection to one monitor. Its methods may be called from several goroutines.
type Client struct {
	conn     *net.UnixConn
	onEvent  func(Event)
	software string
	// turn holds a token while no request is under way. A request whose caller has given up is
	// still under way until its answer comes: the server must not be sent another one.
	turn chan struct{}
	done chan struct{}
	// sent are the times of the last requests to a server that throttles, oldest at oldest. Who has the
	// turn has them.
	sent   []time.Time
	oldest int

	mu     sync.Mutex
	nextID uint64
	call   *call
	err    error
}

// call is the request under way.
type call struct {
	id      string
	command string
	answer  chan answer // has room for it
}

type answer struct {
	value json.RawMessage
	err   error
}

// message is any line of the server. Exactly one of the first four is there.
type message struct {
	Greeting *json.RawMessage `json:"QMP"`
	Return   *json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`

	ID   json.RawMessage `json:"id"`
	Data json.RawMessage `json:"data"`
}

// decode parses one line.
func decode(line []byte) (*message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return nil, fmt.Errorf("not a message: %w", err)
	}
	kinds := 0
	for _, present := range []bool{m.Greeting != nil, m.Return != nil, m.Error != nil, m.Event != ""} {
		if present {
			kinds++
		}
	}
	if kinds != 1 {
		return nil, fmt.Errorf("a message that is %d things at once", kinds)
	}
	return &m, nil
}

// id returns the id of an answer; ok says whether there is one. An id that is no string is nobody's.
func (m *message) id() (id string, ok bool) {
	if len(m.ID) == 0 || bytes.Equal(m.ID, []byte("null")) {
		return "", false
	}
	if json.Unmarshal(m.ID, &id) != nil {
		id = string(m.ID)
	}
	return id, true
}

// Dial connects to the Unix socket of a monitor, as New otherwise.
func Dial(ctx context.Context, socket string, onEvent func(Event)) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the monitor: %w", err)
	}
	return New(ctx, conn.(*net.UnixConn), onEvent)
}

// New takes over conn, waits for the server's greeting, and makes it accept commands. Events are
// given to onEvent, in their order and from one goroutine, which must not block or call the client;
// nil ignores them. The caller closes the client.
func New(ctx context.Context, conn *net.UnixConn, onEvent func(Event)) (*Client, error) {
	c := &Client{
		conn:    conn,
		onEvent: onEvent,
		turn:    make(chan struct{}, 1),
		done:    make(chan struct{}),
	}
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 1<<10)
	line, err := readLine(r)
	if err == nil {
		var m *message
		if m, err = decode(line); err == nil && m.Greeting == nil {
			err = errors.New("the first message is no greeting")
		}
		if err == nil {
			c.software = greeter(*m.Greeting)
			if strings.HasPrefix(strings.ToLower(c.software), "stratovirt") {
				c.sent = make([]time.Time, maxPerPeriod)
			}
		}
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("the monitor did not greet: %w", err)
	}
	go c.read(r)
	c.turn <- struct{}{}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// greeter returns what a greeting says of its program, or "".
func greeter(greeting json.RawMessage) string {
	var g struct {
		Version struct {
			Package string `json:"package"`
			// How the documentation of StratoVirt has it.
			StratoVirt json.RawMessage `json:"StratoVirt"`
		} `json:"version"`
	}
	if json.Unmarshal(greeting, &g) != nil {
		return ""
	}
	if g.Version.Package == "" && len(g.Version.StratoVirt) > 0 {
		var v struct{ Major, Minor, Micro int }
		if json.Unmarshal(g.Version.StratoVirt, &v) == nil {
			return fmt.Sprintf("StratoVirt-%d.%d.%d", v.Major, v.Minor, v.Micro)
		}
	}
	return g.Version.Package
}

// Package is what the server's greeting says of its program, such as StratoVirt-2.3.0; empty if it says
// nothing.
func (c *Client) Package() string { return c.software }

// readLine returns the next line that is not empty; it is valid until the next call.
func readLine(r *bufio.Reader) ([]byte, error) {
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			// Rare: not worth a buffer that lives as long as the machine.
			long := append([]byte(nil), line...)
			for errors.Is(err, bufio.ErrBufferFull) && len(long) <= maxReply {
				line, err = r.ReadSlice('\n')
				long = append(long, line...)
			}
			line = long
		}
		if len(line) > maxReply {
			return nil, fmt.Errorf("a line longer than %d bytes", maxReply)
		}
		if err != nil {
			if err == io.EOF && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if line = bytes.TrimSpace(line); len(line) > 0 {
			return line, nil
		}
	}
}

// read delivers answers and events until the connection ends.
func (c *Client) read(r *bufio.Reader) {
	for {
		line, err := readLine(r)
		var m *message
		if err == nil {
			m, err = decode(line)
		}
		if err != nil {
			c.fail(err)
			return
		}
		switch {
		case m.Event != "":
			if c.onEvent != nil {
				c.onEvent(Event{Name: m.Event, Data: m.Data})
			}
		case m.Return != nil, m.Error != nil:
			c.deliver(m)
		default:
			c.fail(errors.New("a second greeting"))
			return
		}
	}
}

func (c *Client) deliver(m *message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.call
	if call == nil {
		return // an answer to nothing
	}
	// StratoVirt refuses what it cannot parse without naming the id. There is only one request
	// that this can be about.
	if id, ok := m.id(); ok && id != call.id || !ok && m.Error == nil {
		return
	}
	var a answer
	if m.Error != nil {
		a.err = &Error{Command: call.command, Class: m.Error.Class, Desc: m.Error.Desc}
	} else {
		a.value = *m.Return
	}
	c.call = nil
	call.answer <- a
	c.turn <- struct{}{}
}

// fail ends the client.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = fmt.Errorf("the connection to the monitor is lost: %w", err)
	c.conn.Close()
	close(c.done)
}

// Execute runs a command and stores its result in result unless that is nil. args is encoded as the
// command's arguments; nil means none. A refusal is an *Error. When ctx ends before the answer, the
// command may still take effect.
func (c *Client) Execute(ctx context.Context, command string, args, result any) error {
	return c.execute(ctx, command, args, result, nil)
}

// ExecuteWithFile is Execute with a file descriptor that the server receives with the command
// (getfd, add-fd). The caller keeps file.
func (c *Client) ExecuteWithFile(ctx context.Context, command string, args, result any, file *os.File) error {
	return c.execute(ctx, command, args, result, file)
}

func (c *Client) execute(ctx context.Context, command string, args, result any, file *os.File) error {
	select {
	case <-c.turn:
	case <-c.done:
		return fmt.Errorf("QMP %s: %w", command, c.Err())
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: an earlier command is still unanswered: %w", command, ctx.Err())
	}
	if err := c.pace(ctx); err != nil {
		c.turn <- struct{}{}
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	call := &call{command: command, answer: make(chan answer, 1)}
	c.mu.Lock()
	c.nextID++
	call.id = strconv.FormatUint(c.nextID, 10)
	c.call = call
	c.mu.Unlock()

	if err := c.send(call, args, file); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case a := <-call.answer:
		return finish(command, a, result)
	case <-c.done:
		select {
		case a := <-call.answer: // both were ready
			return finish(command, a, result)
		default:
		}
		return fmt.Errorf("QMP %s: %w", command, c.Err())
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: no answer: %w", command, ctx.Err())
	}
}

// pace waits until the server takes another request.
func (c *Client) pace(ctx context.Context) error {
	if c.sent == nil {
		return nil
	}
	if wait := throttlePeriod - time.Since(c.sent[c.oldest]); wait > 0 {
		timer := time.NewTimer(wait)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-c.done:
			return c.Err()
		case <-ctx.Done():
			return fmt.Errorf("the server takes no more than %d requests in %v: %w", maxPerPeriod, throttlePeriod, ctx.Err())
		}
	}
	c.sent[c.oldest] = time.Now()
	c.oldest = (c.oldest + 1) % len(c.sent)
	return nil
}

func finish(command string, a answer, result any) error {
	if a.err != nil || result == nil {
		return a.err
	}
	if err := json.Unmarshal(a.value, result); err != nil {
		return fmt.Errorf("QMP %s: cannot understand the answer: %w", command, err)
	}
	return nil
}

// send writes the request of call. If nothing was written the turn is free again; a request that
// was cut off ends the client.
func (c *Client) send(call *call, args any, file *os.File) error {
	request := struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        string `json:"id"`
	}{call.command, args, call.id}
	body, err := json.Marshal(request)
	if err == nil && len(body) > maxRequest {
		err = fmt.Errorf("a request of %d bytes is longer than %d", len(body), maxRequest)
	}
	if err != nil {
		c.mu.Lock()
		c.call = nil
		c.mu.Unlock()
		c.turn <- struct{}{}
		return err
	}
	var rights []byte
	if file != nil {
		rights = syscall.UnixRights(int(file.Fd()))
	}
	c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	n, _, err := c.conn.WriteMsgUnix(body, rights, nil)
	if err == nil && n < len(body) {
		err = io.ErrShortWrite
	}
	if err != nil {
		c.fail(err)
		return err
	}
	return nil
}

// Done is closed when the connection has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection has ended; nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. Commands under way fail.
func (c *Client) Close() error {
	c.fail(net.ErrClosed)
	return nil
}
