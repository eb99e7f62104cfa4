"""Triton kernels and their launchers. Imported, with triton, when the first tensor arrives that they serve."""
