"""``index`` makes a search index of a feature of stage 06; ``search`` finds the samples nearest to a text, a picture or
a sample.

An **index** is a folder whose ``index.json`` names a **build**: vectors, samples, and a faiss index over the vectors.
A **query** is a vector of the same model; a **hit** is a sample that was found, with its cosine.
"""
