"""Datasets at rest: validated at upload, encrypted in chunks under wrapped keys, read back as Arrow tables."""
