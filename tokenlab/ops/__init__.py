"""Pure JAX operations on batch-first arrays: select, gather, merge, attend, encode positions.

Import the functions from their modules (`from tokenlab.ops.merge import bipartite_soft_matching`); nothing is
re-exported here, because `gather`, `merge` and `attention` name both a module and a function in it.
"""
