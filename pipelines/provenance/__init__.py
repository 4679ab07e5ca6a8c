"""Which data, choices and code made which checkpoint: explained from what is on disk, and verified byte by byte."""
