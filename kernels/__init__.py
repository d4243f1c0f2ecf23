"""Triton kernels and the launchers that allocate for them, nothing else.

Installed as `fastmoco.kernels`. Here belong `@triton.jit` functions and, beside each, the function that
allocates its outputs and launches it. Argument checks, autograd and the choice between implementations belong
in `fastmoco.ops`, which alone imports this package.
"""

if __name__ != "fastmoco.kernels":
    # A second copy under another name would compile, and register, every kernel twice.
    raise ImportError("import this package as fastmoco.kernels, from an installed fastmoco (pip install .)")
