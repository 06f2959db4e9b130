"""`xmoe-convert`: makes a trained dense fairseq Transformer sparse. Start reading at `convert_command.py`.

Nothing is imported here, so that the plugin does not load what only the converter needs.
"""
