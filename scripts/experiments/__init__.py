"""The demo and the experiments of docs/: models and sizes as data; what trains, scores and compares them."""
