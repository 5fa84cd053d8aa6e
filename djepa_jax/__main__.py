"""`python -m djepa_jax` is the command line of `djepa_jax.main`."""

import sys

from djepa_jax.main import main

sys.exit(main())
