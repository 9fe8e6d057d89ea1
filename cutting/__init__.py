"""From a model and a photo to a cutout: the package behind `predict.py` and `evaluate.py`."""
