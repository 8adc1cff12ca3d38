"""Teachers that do not run in this process: requests to their servers or endpoints, checks of the servers, and the kept replies."""
