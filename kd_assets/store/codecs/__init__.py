"""Codecs: how numbers of a cache are held in fewer bytes. Arrays in, columns out, and back; no torch, no manifest."""
