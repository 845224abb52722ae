"""Scores: pure functions of two masks, and the protocols that say what an empty mask is worth."""
