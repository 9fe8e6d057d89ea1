"""Reads the data from disk and makes samples of them: the package behind `datasets.py`."""
