"""From a trained network and new scans to masks on the grids of those scans."""
