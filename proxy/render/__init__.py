"""A service table as kernel state, one file a mode."""
