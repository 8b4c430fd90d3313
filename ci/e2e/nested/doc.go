// Package nested boots a node that is a virtual machine of its own, with a kernel, a systemd, KVM and
// vsock, and tries the appliance on it as an administrator does. The machine is QEMU's, without any
// acceleration: its emulated processor has SVM, so that the pods' virtual machines run by KVM in it.
//
// The package is the bed. Its tests are the scenarios: the same program that boots the node is copied
// onto it and runs them there.
package nested
