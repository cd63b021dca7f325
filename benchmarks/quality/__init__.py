"""How well the check, the proxies and the whole model do; nothing is timed."""
