"""The functions `segkit.train`, `segkit.infer` and so on, which the commands call too."""
