"""Language models that run inside the process, for ``--embedded``."""
