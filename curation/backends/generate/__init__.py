"""Text-to-image models through diffusers: ``Backend`` runs any pipeline, ``presets`` knows the settings of the common
ones.
"""
