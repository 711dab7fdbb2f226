"""Many pictures from one command: what to classify, by whom, and the rows that come of it."""
