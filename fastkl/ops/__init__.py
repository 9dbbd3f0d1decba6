"""Connect the public functions to an engine: ops with rules for autograd, vmap and compilers.

Reading order: row_op, summed_op and topk_op (from logits) and linear_op, linear_sum_op and
linear_cells_op (from hidden states) define the ops, each through dual_op; engine runs them on the
kernels (problems) or on the reference (reference_rows; cpu_* on a CPU). A teacher's top k:
topk_rows on the kernels, topk_lists by torch's operations.
"""
