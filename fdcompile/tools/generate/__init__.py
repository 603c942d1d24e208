"""Pictures of many prompts, on as many devices as there are processes: prompts, result store, loop."""
