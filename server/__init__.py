"""HTTP server of indexes, with the explorer."""
