"""Generated programs: random models around linear -> cross entropy, run with the pass and without.

``grammar`` writes them, ``running`` runs them, ``checking`` says whether the pass was wrong, and
``python -m tests.programs.fuzz`` does so until told to stop.
"""
