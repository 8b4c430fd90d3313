package qmp

const (
	MaxRequest = maxRequest
	MaxReply   = maxReply
)
