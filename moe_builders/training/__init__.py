"""Helpers that recipes wire together; each is a plain function or a small value."""
