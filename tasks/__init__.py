"""How often: retries, caching, timeouts, cancellation and artifacts around the work in `pipelines`.

Tasks have no tags: before a task begins, Prefect asks its server for a place under each tag's limit, whether there is a
limit or not. That is a lease to be renewed as long as the task runs, and over SQLite often a refusal and two seconds.
"""
