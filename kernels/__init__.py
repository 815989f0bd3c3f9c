"""megacpt_kernels: one plain-torch reference per operation; it is the specification, the CPU path and the oracle.

Knows neither megacpt nor Megatron. Triton kernels stand beside their references as they are written.
"""
