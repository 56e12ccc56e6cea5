"""`python -m btlm`."""

import sys

from btlm.cli import main

sys.exit(main())
