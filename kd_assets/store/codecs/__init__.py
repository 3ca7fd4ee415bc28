"""Codecs: other ways for the numbers of a part file to lie in it, so that they take fewer bytes.

Used by the store and by the teacher's writer; needs numpy and pyarrow. A codec is named in a recipe and stands in the
identity, and in the metadata of every part's schema. The invariant: what reads a part (`partfile.PartFile`) gives the
columns, types and shapes that the cache has without a codec, so that nothing behind it knows of one.
"""
