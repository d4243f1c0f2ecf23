"""What a run on many GPUs will send, hold and take, worked out beforehand; docs/distributed.md states the formulas."""
