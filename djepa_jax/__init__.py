"""D-JEPA in JAX: denoising with a joint-embedding predictive architecture (arXiv 2410.03755)."""

__version__ = "0.1.0"
