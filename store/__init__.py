"""The index on disk: rows, documents, encoder arrays, manifests, checksums. Knows no models, no torch, no Ray."""
