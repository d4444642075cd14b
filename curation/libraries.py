"""Libraries that are imported when they are first used: ``from curation.libraries import np``.

A run that finds nothing to do, ``--help``, and a stage that only copies bytes use none of them; numpy alone would take
longer to import than such a run takes.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["PIL", "ExifTags", "Image", "PngImagePlugin", "features", "np", "requests", "simplejpeg", "urllib3"]


class _Library(ModuleType):
    """Stands for a library until a module uses it, and then gives that module the library itself, which is faster."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        user = sys._getframe(1).f_globals
        for key, value in list(user.items()):
            if value is self:
                user[key] = module
        return getattr(module, name)


if TYPE_CHECKING:
    import numpy as np
    import PIL
    import requests
    import simplejpeg
    import urllib3
    from PIL import ExifTags, Image, PngImagePlugin, features
else:
    np, simplejpeg = _Library("numpy"), _Library("simplejpeg")
    PIL, ExifTags, Image = _Library("PIL"), _Library("PIL.ExifTags"), _Library("PIL.Image")
    requests, urllib3 = _Library("requests"), _Library("urllib3")
    PngImagePlugin, features = _Library("PIL.PngImagePlugin"), _Library("PIL.features")
