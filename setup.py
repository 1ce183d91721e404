"""Puts the config files below `lazyattn` in a wheel: other projects have a `configs`, too.

All else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies `configs/` to `lazyattn/configs/`, unless the tree itself is installed."""

    def run(self) -> None:
        """Builds the package."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "lazyattn", "configs")
            shutil.rmtree(target, ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree("configs", target, ignore=ignored)


setup(cmdclass={"build_py": BuildWithConfigs})
