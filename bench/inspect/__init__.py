"""What a kernel becomes on a GPU that is not here: compiled, read, and judged."""
