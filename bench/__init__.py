"""Measures, inspects and records; stands on the engine and nothing stands on it."""
