"""Parallel execution: in threads of this process, or in Ray workers."""
