"""Names the packages, which pyproject.toml can find or list, but not both."""

import sys

from setuptools import find_packages, setup

# In the wheel, configs/ is a package. With -e this folder goes on sys.path, which setuptools does
# for packages that lie as they are named: its other way loses to any folder called djepa_jax, such
# as the one of this checkout in the folder above.
configs = {} if "editable_wheel" in sys.argv else {"djepa_jax.config.builtin": "configs"}
setup(
    packages=[*find_packages(include=["djepa_jax*"]), *configs],
    package_dir={"": ".", **configs},
)
