"""`python -m fastmoco`, which torchrun can start."""

import sys

from fastmoco.cli import main

sys.exit(main())
