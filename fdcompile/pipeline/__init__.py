"""Attaches to a stock diffusers pipeline, and leaves it again without a trace."""
