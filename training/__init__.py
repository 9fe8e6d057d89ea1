"""What a run needs between its steps: what stands behind `trainer.py`."""
