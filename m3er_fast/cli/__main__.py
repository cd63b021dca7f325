"""``python -m m3er_fast.cli``."""

import sys

from m3er_fast.cli import main

sys.exit(main())
