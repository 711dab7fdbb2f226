"""The search for configurations: spaces, strategies, and the processes that try them."""
