"""`python -m gdn` is the command `gdn`."""

from __future__ import annotations

import sys

from gdn.cli import main

sys.exit(main())
