"""Puts the numbered scripts and the job scripts into the wheel, as data of the package (``curation.PROJECT``).

They stand once in the project: at its top.  All else that there is to say of the package stands in pyproject.toml.
"""

from __future__ import annotations

import os
from glob import glob

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = os.path.join("curation", "project")
FILES = ("[0-9][0-9]_*.py", "*.sh", "examples/ollama/*", "constraints.txt", "model-packages.txt")


class BuildWithScripts(build_py):
    """In an editable installation nothing is copied: there, the package finds the scripts at the top of the clone."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._scripts():
                self.mkpath(os.path.dirname(target))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._scripts())]

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *(source for source, _ in self._scripts())]

    def _scripts(self) -> list[tuple[str, str]]:
        """Each file, and where it goes."""
        sources = sorted(source for pattern in FILES for source in glob(pattern) if source != "install.sh")
        return [(source, os.path.join(self.build_lib, FOLDER, source)) for source in sources]


setup(cmdclass={"build_py": BuildWithScripts})
