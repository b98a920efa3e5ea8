"""Triton backend of kdkernels, imported as ``kdkernels.triton_kernels``."""
