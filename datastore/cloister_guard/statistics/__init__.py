"""Statistics over columns: planned from public facts, computed exactly in integers, released with discrete noise."""
