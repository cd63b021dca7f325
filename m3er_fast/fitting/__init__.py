"""Fitting at scale: a model's standardiser, check and proxies, from corpora that do not fit into memory."""
