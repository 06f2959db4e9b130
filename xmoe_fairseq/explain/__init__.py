"""`xmoe-explain`: which experts the tokens of a sentence took. Start reading at `collect.py`."""
