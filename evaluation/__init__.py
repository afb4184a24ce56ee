"""Is the answer true? Ground truth by retraining, the statistic that compares scores with it, and baselines beside them."""
