"""Which step is this, what runs there, and what did it cost."""
