"""The staged program, and what can be asked of a graph: its weights, FLOPs and memory."""
