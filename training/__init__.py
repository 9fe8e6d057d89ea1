"""The package behind `trainer.py`: settings, launching, the pieces of a step, checkpoints, logging."""
