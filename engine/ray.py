"""`classify` and `features` on Ray Data, by the name that their users import: `jobs/ray.py`."""

from .jobs.ray import classify as classify
from .jobs.ray import features as features
