"""Dataset layouts: one file per family, and `table.LAYOUTS` that lists them."""
