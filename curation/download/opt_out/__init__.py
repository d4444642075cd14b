"""The wishes of those whose images are downloaded.

A **site** is a scheme, host and port; its **rules** say what may be downloaded from it; a **look-up** finds them, in
memory, in the files that the processes of a root share, or by asking the site.
"""

from curation.download.opt_out.lookups import (
    OPT_OUT_KINDS,
    LookupCount,
    Lookups,
    OptOut,
    OptOutPolicy,
    SmallReply,
    kinds_of,
)

__all__ = ["OPT_OUT_KINDS", "LookupCount", "Lookups", "OptOut", "OptOutPolicy", "SmallReply", "kinds_of"]
