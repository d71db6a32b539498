"""`python -m metrics`: the command `caption-scores`."""

import sys

from metrics.caption_scores.command import main

if __name__ == "__main__":
    sys.exit(main())
