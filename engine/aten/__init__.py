"""torch's own graphs, in the words of `spec.py`."""
