"""Planning: from a data fingerprint and a memory budget to patch, batch, strides, mode, spacing and normalisation."""
