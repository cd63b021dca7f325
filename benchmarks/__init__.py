"""Benchmarks of speed (`benchmarks.speed`) and quality (`benchmarks.quality`), counts of kernels without a GPU
(`benchmarks.counts`), and reports (`benchmarks.report`).
"""
