"""Names the packages, which pyproject.toml can find or list, but not both."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["djepa_jax*"]), "djepa_jax.config.builtin"])
