"""python -m albor_train."""

import sys

from albor_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
