"""From a model and a photo to a cutout: what stands behind `predict.py` and `evaluate.py`."""
