"""Faster forms of single layers, equal to PyTorch's own within rounding."""
