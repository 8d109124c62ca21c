"""Typed run configuration: `schema` (the settings), `loader` (YAML, overrides), `validation`, `derived`."""
