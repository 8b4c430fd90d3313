// Package handover lets connections survive the daemon. What must outlive it, sockets and the bytes
// that are on their way, stands in files that the service manager keeps (Store), and the next daemon
// goes on with them: after an orderly restart, and after a SIGKILL between any two instructions.
//
// The second is why bytes go through an Inbox and an Outbox. To take bytes from one file, give them
// to another and remember how far that went takes several system calls, and a process can die between
// them. So the remembering is left to the kernel: a call that moves bytes between a socket or FIFO and
// a memory file without passing them through the process moves the memory file's own position in the
// same breath, and that position lives as long as some process, here the service manager, has the
// file open.
//
//	source ──splice──► pipe ──splice──► Inbox's file        what arrived ends at the file's position
//	Outbox's file ──sendfile or splice──► sink              what was delivered ends at the file's position
//
// The first pages of each file hold what its owner has to remember beside that. They are changed by
// single small writes, which happen or do not. Positions only grow; what nobody needs any more is
// punched out of the file, so that a file's memory is what is on its way, and a page or two.
package handover
