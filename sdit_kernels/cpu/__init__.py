"""CPU kernels: numba functions over raw addresses. Imported, with numba, when the first CPU tensor arrives."""
