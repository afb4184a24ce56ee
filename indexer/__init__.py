"""Whitened rows from a model and examples: capture, projection, curvature. Independent of files, Ray and the server."""
