"""Headers and stubs of the compiled kernels; their code is in ext/. Nothing here holds policy or logs."""
