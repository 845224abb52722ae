"""From files on disk to volumes and cases: formats, dataset layouts, and the checks of what was found."""
