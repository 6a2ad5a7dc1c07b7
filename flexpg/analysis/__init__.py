"""Reports and figures of what sharing prefixes saves; `import flexpg` does not import it."""
