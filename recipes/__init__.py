"""Recipes for `tune run`, which needs a package here. It is never installed under this name."""
