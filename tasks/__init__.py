"""How often: retries, caching, timeouts, cancellation and artifacts around the work in `pipelines`."""
