"""Readers, one per format: a file in, its text out as blocks or pairs. None of them knows where files lie."""
