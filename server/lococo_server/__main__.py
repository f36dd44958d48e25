"""python -m lococo_server: lococo-serve."""

import sys

from .cli import main

sys.exit(main())
