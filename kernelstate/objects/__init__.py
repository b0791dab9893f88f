"""The kinds of kernel object, as typed records."""
