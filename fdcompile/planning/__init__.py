"""Where to recompute, and how to forecast between: measured on a pipeline's own calls."""
