// Package pod manages the pods of the node: their states, the boot of their virtual machines as a
// list of named stages, one undo list per pod, and the journal from which another daemon finds
// them again. It speaks no wire protocol; package controller does.
//
// The states of a pod:
//
//	Create ──► Created ──Start──► Starting ──all stages done──► Ready
//	              │                   │                           │
//	              │ Stop, Shutdown,   │ a stage failed, Stop,     │ Stop, Shutdown, the VM ended,
//	              │ never started     │ the caller went away      │ the guest misbehaved
//	              ▼                   ▼                           ▼
//	           Stopping           (undone, forgotten)          Stopping ──► Stopped ──Shutdown──► (forgotten)
//
// What holds in every state:
//
//   - Whatever exists on the host for a pod is either named by a step of its undo list or found
//     again from its state directory and its cgroup leaf, so that neither an error nor the death of
//     the daemon loses it.
//   - The state directory goes last, and only when everything else is gone: it is the last trace of
//     a process that could not be killed.
//   - Tearing down never needs the guest. Where the guest is asked for something, the answer is
//     awaited for a moment only.
//   - A pod outlives the daemon in every state. Another daemon takes it over with proof that what its
//     journal names is the pod's and lives; see Manager.Recover. It ends a pod only if it knows that
//     the pod cannot go on, and one that only another version of the daemon can manage it holds: such
//     a pod counts as ready and is not touched.
//   - A pod that nobody will ask for again, because its Start failed or never came, removes itself.
//   - A stopped pod keeps its state directory and its task socket until Shutdown: its client still
//     has to learn how the containers ended.
package pod
