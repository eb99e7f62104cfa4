"""CPU kernels: numba functions over raw addresses. The package imports them and numba for the first CPU tensor."""
