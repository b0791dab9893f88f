"""A policy table as kernel state, one file a mode."""
