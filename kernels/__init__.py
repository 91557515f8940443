"""Functions on tensors: the arithmetic that everything above is made of.

A file here knows torch and nothing of modules, code books, configs or files.  Each holds the plain
formula and, where it has a gradient, the backward written by hand, so that what is kept in memory
between forward and backward is chosen and not left to autograd.
"""
