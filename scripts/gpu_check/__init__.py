"""What a first GPU can show: each file has checks, check.py runs them. See check_gpu.sh."""
