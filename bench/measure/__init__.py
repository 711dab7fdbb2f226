"""Measuring: problems, contestants, clocks and roofs, and the verbs layers, model and pipeline."""
