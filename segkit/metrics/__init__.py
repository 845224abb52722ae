"""Scores: pure functions of two masks, the protocols with their rules for empty masks, and statistics over cases."""
