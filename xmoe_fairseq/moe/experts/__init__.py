"""The small FFNs, and the kernels that compute them."""
