"""What: the work itself, plain Python that needs no server and never imports prefect."""
