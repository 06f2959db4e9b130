"""Routing -> rows by expert, here or on the rank that holds it, and back."""
