"""`python -m moe_trace`: the command moe-native."""

import sys

from moe_trace.cli import main

sys.exit(main())
