"""Seeded changes of files, by what they are made of: bytes, packed streams, trees, pickles, headers, graphs."""
