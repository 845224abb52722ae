"""Data: from files on disk to prepared arrays, patches and back."""
