"""Seeded phantoms: BraTS-like volumes in the layouts that data sets come in."""
