package container

import "kuasar.io/kuasar/sandboxer/storage"

// Mount is a mount of the host that is not done yet.
type Mount = storage.Mount
