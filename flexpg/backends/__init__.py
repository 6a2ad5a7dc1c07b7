"""Implementations of attention over a prefix tree: flex, split, dense."""
