"""Measures, inspects, tunes, races and reports; stands on the engine and nothing stands on it.

What a user can say stands in `__main__` and `choices`; what a verb does is `run` in a module of the
verb's name, flat here or in the room that does the work:

    measure  problems, contestants, clocks and roofs: layers, model, pipeline
    inspect  what a kernel becomes on a GPU that is not here
    tune     the search for configurations, and for the schedule of launches
    race     somebody else's kernel, proved and raced in a process of its own, and those that ship
    report   results as pages and pictures
    results  what was measured, and NOTES.md: predicted, tried, found

All stand on `records`: rows with their match and their origin.
"""
