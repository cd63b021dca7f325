"""``python -m benchmarks.report RUN.json...`` writes the generated part of ``docs/performance.md``."""

import sys

from benchmarks.report.page import main

sys.exit(main())
