"""`python -m pamm`."""

import sys

from pamm.cli import main

sys.exit(main())
