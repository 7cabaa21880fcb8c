"""Runs as Python files: each has get_config(variant) and imports ml_collections only."""
