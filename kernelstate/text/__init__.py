"""The native tools' text: printed and parsed."""
