"""Encoders with stage taps, the projectors of the stage losses, and weights in and out."""
