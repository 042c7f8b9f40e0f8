"""Imported once by the fork server: all that a run, its converters and its plot need. Starts no thread."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

OWN = ("nemo_dpo.app", "nemo_dpo.launch", "nemo_dpo.convert")
for name in (*OWN, "nemo.utils.exp_manager", "transformers", "matplotlib.pyplot"):
    importlib.import_module(name)
