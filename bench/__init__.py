"""Measures, inspects, tunes, races and reports; stands on the engine and nothing stands on it.

What a user can say stands in `__main__` and `choices`, what a verb does is `run` in the module of
its name (`layers`, `model`, `tune`, `race`, ...). All of these stand on `problem` (layers cut out
of a network, with random tensors and the right answer), `timing` (three clocks), `records` (rows
with their match and their origin) and `peers` (who else can compute it). What is more than a file
has a room:

    machine     what a kernel becomes on a GPU that is not here
    lab         the search for configurations
    rivals      somebody else's kernel, proved and raced in a process of its own
    candidates  ways to compute a layer that ship, to be raced
    drawing     results as pages and pictures
    results     what was measured, and NOTES.md: predicted, tried, found
"""
