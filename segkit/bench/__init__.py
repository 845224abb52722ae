"""The tables of memory and speed that `segkit bench` measures."""
