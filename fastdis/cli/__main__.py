"""``python -m fastdis.cli``: the ``fastdis`` command without its script."""

import sys

from fastdis.cli import main

sys.exit(main())
