"""`python -m hope_jax` is `hope`."""

import sys

from hope_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
