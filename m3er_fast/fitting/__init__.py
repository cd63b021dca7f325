"""Fitting at scale: what a model learns beside its network, from corpora that do not fit into memory."""
