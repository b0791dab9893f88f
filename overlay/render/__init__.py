"""A peer table as kernel state, one file a backend."""
