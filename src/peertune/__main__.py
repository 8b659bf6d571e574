"""`python -m peertune` is the `peertune` command."""

import sys

from peertune.cli import main

if __name__ == "__main__":
    sys.exit(main())
