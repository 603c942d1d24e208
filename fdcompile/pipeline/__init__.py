"""Attaches to a stock diffusers pipeline, and detaches from it without a trace."""
