"""Routers: tokens -> Routing, one file each."""
