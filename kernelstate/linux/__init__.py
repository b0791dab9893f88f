"""The only code that reads or changes the kernel's configuration."""
