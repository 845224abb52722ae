"""Training: one `fit()` that reads top to bottom, and the tasks it serves."""
