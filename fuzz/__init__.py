"""Fuzzing of everything that reads untrusted bytes; see README.md. Not part of the wheel."""
