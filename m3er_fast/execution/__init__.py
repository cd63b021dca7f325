"""How work is spread: over threads of this process, or over workers of Ray."""
