package pod

// Count returns how many pods the manager knows, whatever their state.
func (m *Manager) Count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.pods)
}
