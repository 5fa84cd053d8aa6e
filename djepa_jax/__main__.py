"""`python -m djepa_jax` is the command `djepa`."""

import sys

from djepa_jax.main import main

sys.exit(main())
