"""Phantoms: seeded BraTS-like volumes in the layouts of published data sets, and a baseline for them."""
