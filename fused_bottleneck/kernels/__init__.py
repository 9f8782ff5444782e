"""The Triton kernels of the stages, one file per product.

Imported only by ``triton_stages``, as importing them imports triton. Every file reads from the
kernel to its host launcher; ``prologues`` has what kernels share on load and on store, ``config``
the block sizes, ``launch`` the one place that calls a kernel.
"""
