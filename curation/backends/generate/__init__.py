"""Text-to-image models through diffusers: a file a family, found by the scan in ``curation.backends``.

A family's ``Backend`` is ``diffusers.Backend``, which runs any pipeline, with two tables of its own: ``presets``, how
its models are meant to be called, and ``text_results``, what its pipelines' text encoders return.  ``presets`` finds
the family of a model; ``calls`` and ``loading`` have what all families share; ``tiny`` is the stand-in of
``--embedded``.
"""
