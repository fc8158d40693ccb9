"""Random calls of layers, steps, functions, runners of streams and ops: :mod:`tools.fuzz`."""
