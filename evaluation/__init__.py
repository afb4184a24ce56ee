"""Evaluation of scores: ground truth by retraining, the linear datamodeling score, checks, and baselines."""
