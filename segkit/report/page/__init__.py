"""One HTML page about runs, masks and scores that needs nothing but itself."""
