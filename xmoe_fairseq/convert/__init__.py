"""`xmoe-convert`: makes a trained dense Transformer sparse. Start reading at `convert_command.py`."""
