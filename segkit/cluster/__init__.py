"""Work on cases spread over the machines of a cluster."""
