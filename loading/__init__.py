"""From disk to a sample: what stands behind `datasets.py`."""
