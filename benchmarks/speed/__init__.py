"""Time and memory of the operations, the whole model and scoring, beside the libraries they are compared with."""
