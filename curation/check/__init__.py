"""Is a picture what was asked for?  What judges pictures, and what it says of one.

A **check** looks at the pixels that readers will see, those of the encoded JPEG, and gives a **verdict**.  Each kind of
check has a file in ``curation/backends/check``; stage 03 asks them about its pictures, stage 05 about its captions.
"""

from curation.check.api import Asked, Check, Verdict, still_holds
from curation.check.settings import CheckSettings

__all__ = ["Asked", "Check", "CheckSettings", "Verdict", "still_holds"]
