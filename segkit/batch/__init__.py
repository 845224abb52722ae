"""A folder of cases in, a folder of results and a manifest out: on this machine, or on the nodes of a Ray cluster."""
