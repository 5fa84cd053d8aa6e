"""What the command line says of failures that can happen to anybody."""

import re

import jax

from djepa_jax.runtime import distributed
from djepa_jax.runtime.storage import STORAGE_PACKAGES
from djepa_jax.sampling.generator import OUT_OF_MEMORY

# What XLA, the service that connects processes, Gloo and NCCL say when another process is gone.
LOST = re.compile(
    r"\A(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b|heartbeat|Connection (closed|reset|refused)"
    r"|Broken pipe|remote process exited",
    re.IGNORECASE,
)


class UserError(Exception):
    """Something that a person can mend; the text is one line that ends in the remedy."""


def expected(error: Exception) -> str | None:
    """What to say of a failure that can happen to anybody; None of one that is a mistake in this
    program.
    """
    from djepa_jax.checkpoints.orbax_io import CheckpointError
    from djepa_jax.training.loop import TrainingError

    if not distributed.alone() and (reason := lost(error)):
        return (
            f"another process has ended or cannot be reached ({reason}); start all of them again "
            "to go on from the last save."
        )
    if isinstance(error, (ValueError, OSError, CheckpointError, TrainingError, FloatingPointError)):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and OUT_OF_MEMORY in str(error):
        reason = str(error).splitlines()[0]
        return (
            f"the devices' memory is too small ({reason}); in training raise config.microbatches, "
            "in sampling lower "
            "config.sample.batch_size or config.autoencoder.batch_size."
        )
    if type(error).__module__.partition(".")[0] in STORAGE_PACKAGES:
        return f"storage: {type(error).__name__}: {error}"
    return None


def lost(error: BaseException | None) -> str | None:
    """What JAX said when another process was gone; None if that is not behind the error."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None
