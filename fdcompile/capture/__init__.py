"""Captures a UNet call as one ATen graph, and guards what the graph depends on."""
