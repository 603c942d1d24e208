"""The staged program, and analyses of graphs: weights, FLOPs, memory."""
