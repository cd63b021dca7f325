"""The operations on the CPU: fewer passes over memory than the reference, and gradients worked out by hand."""
