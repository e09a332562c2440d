"""The GPU kernels behind the plugins, in Triton: what they compute, the table of what is compiled, and the compiler.

``numerics`` rounding and products; ``rms_norm``, ``attention`` the kernels; ``table`` names, arguments, variants, chips;
``launch`` which of them each op runs; ``compile`` ahead of time, without a GPU; ``loop`` the same kernels on the CPU, under Triton's interpreter.
"""
