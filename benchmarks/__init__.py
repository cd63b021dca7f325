"""What measures speed (`benchmarks.speed`) and quality (`benchmarks.quality`), and what reports it."""
