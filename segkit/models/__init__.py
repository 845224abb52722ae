"""Networks: one file per family, a visible table of them (`table`), and the blocks they share."""
