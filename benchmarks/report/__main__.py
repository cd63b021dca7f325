"""``python -m benchmarks.report RUN.json...`` writes the conclusions and the tables of speed in ``docs/``."""

import sys

from benchmarks.report.page import main

sys.exit(main())
