"""The program: command line, daemon, wiring."""
