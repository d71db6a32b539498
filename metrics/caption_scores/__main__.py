"""`python -m caption_scores`: the command `caption-scores`."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
