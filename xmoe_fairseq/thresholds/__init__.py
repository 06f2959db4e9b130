"""Finds, measures and writes the threshold t of a trained model. Start reading at `search.py`.

Nothing is imported here, so that the plugin does not load what only `xmoe-threshold` and `xmoe-convert` need.
"""
