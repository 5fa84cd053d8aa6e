"""D-JEPA in JAX: denoising with a joint-embedding predictive architecture (arXiv 2410.03755).

import djepa_jax
model = djepa_jax.load("runs/digits")
images = model.sample(labels=[3, 3, 7], seed=0)
"""

__version__ = "0.1.0"
__all__ = ["Model", "load"]


def __getattr__(name: str):
    """The Python interface, imported when it is first used, so that the package itself imports in
    no time.
    """
    if name in __all__:
        from djepa_jax.sampling import model

        return getattr(model, name)
    raise AttributeError(f"module 'djepa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
