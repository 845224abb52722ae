"""Hostile inputs for every parser of segkit: made by seeds and mutators, run in a process that may die.

`python tests/fuzz/run.py` runs them; `tests/fuzz/test_replay.py` replays the corpus and a few hundred of each.
"""
