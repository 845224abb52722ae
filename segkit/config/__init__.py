"""Configuration: the frozen base class, and reading YAML with every problem reported at once."""
