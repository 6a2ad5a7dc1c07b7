"""Implementations of attention over a prefix tree."""
