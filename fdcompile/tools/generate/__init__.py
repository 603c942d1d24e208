"""Many prompts, on as many devices as there are processes: a stream of prompts, a ledger, a loop."""
