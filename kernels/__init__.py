"""GPU kernels of m3er-fast, imported as ``m3er_fast.kernels``.

The folder stands at the top of the repository and is linked into the package, so it must never be imported under its
bare name as well: two copies of a kernel file would register each custom operator twice, and torch keeps the second
without a word.
"""

if __name__ == "kernels":
    raise ImportError("import m3er_fast.kernels instead of kernels: the bare name would register every operator twice")
