"""The trusted process: datasets, queries, training, and the one way out (`release.py`)."""
