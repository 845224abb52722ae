"""The functions behind `segkit.train`, `segkit.infer` and so on, which the command line calls too."""
