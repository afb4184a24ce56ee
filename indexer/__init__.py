"""From a model and examples to whitened rows: capture, projection, curvature. Knows no files, no Ray, no server."""
