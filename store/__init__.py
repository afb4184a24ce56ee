"""The index on disk: rows, documents, encoder arrays, manifests, checksums; without models, torch or Ray."""
