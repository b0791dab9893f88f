"""The packet path in C, and its twin in Python."""
