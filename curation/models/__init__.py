"""What all models need, whatever they compute: their weights and the room that they take.

**Weights** come from a path, a URL with a sha256, or a hub id; the **hub cache** says which revision that is; a **batch
size** fits the device, or shrinks until it does; an ONNX **session** runs on the device that was asked for.
"""
