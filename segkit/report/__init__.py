"""The HTML page of `segkit report` and the pictures in output folders: label maps and numbers, no models."""
