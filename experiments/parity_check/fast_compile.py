"""Flags for compiling many small programs on CPUs; imports nothing, as they must be set before JAX starts."""

FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Most of the time goes into compiling. LLVM's optimizations, which only make the code faster, double it."""
