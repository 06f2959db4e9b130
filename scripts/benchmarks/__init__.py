"""Times the layer, whole models and trained runs; scripts/benchmark_*.sh say what each measures."""
