"""Fit and build as jobs: configuration, plan, workers, progress. Ties the indexer to the store; does no mathematics."""
