"""Face detectors: a file each, with a ``Backend`` that turns pixels into scored boxes."""
