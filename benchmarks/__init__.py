"""Benchmarks of speed (`benchmarks.speed`) and quality (`benchmarks.quality`), and reports (`benchmarks.report`)."""
