"""Pretraining: configuration, recipes, the training step, checkpoints and metrics."""
