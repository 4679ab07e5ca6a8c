"""The command line: its flags, its files and what it shows."""
