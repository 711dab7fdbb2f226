"""`classify` on Ray Data, by the name that its users import: `jobs/ray.py`."""

from .jobs.ray import classify as classify
