"""Metrics, pictures and the report."""
