"""Imported once by the fork server: all that a run, its converters and its plot need. Starts no thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


