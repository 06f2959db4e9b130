"""`xmoe-threshold`: finds, measures and writes the t of a trained model. Start reading at `search.py`."""
