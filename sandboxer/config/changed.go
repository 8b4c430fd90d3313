package config

import (
	"reflect"
	"slices"
)

// Changed lists the keys, dotted and sorted, whose values differ between two configurations.
func Changed(a, b *Config) []string {
	var keys []string
	others := b.fields()
	for key, value := range a.fields() {
		// Both are pointers to the same type; what they point to is compared.
		if !reflect.DeepEqual(value, others[key]) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}
