"""UNet call -> one ATen graph, and what that graph has baked in."""
