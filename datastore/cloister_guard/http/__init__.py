"""The guard's HTTP face: the routes, and the servers that carry them."""
