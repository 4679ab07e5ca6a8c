"""Images, shards, the order of samples, and batches."""
