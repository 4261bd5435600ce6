"""`python -m attnlab.evals` is `attnlab-eval`."""

import sys

from .cli import main

sys.exit(main())
