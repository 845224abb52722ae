"""Scores and pictures of masks that exist: this room knows label maps and numbers, not models."""
