"""Fit and build as jobs: configuration, settings, workers, progress. Ties the indexer to the store; does no mathematics."""
