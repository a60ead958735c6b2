"""A small simulator of PTX for sm_80: compiled kernels executed without a GPU.

A vector of NumPy has an element for each thread, and all warps of many blocks go in step. What it shows and the interpreter
of Triton cannot: layouts, shared memory, shuffles and votes, and blocks of PTX, as compiled. It refuses reads of bytes that
nobody wrote, accesses beside every buffer, races, and threads that store different values to one address.

| module | what it holds |
|---|---|
| `program.py` | PTX text as data |
| `arithmetic.py` | what instructions compute |
| `memory.py` | memory that watches |
| `translation.py` | a kernel as Python code |
| `machine.py` | threads, warps and barriers |
| `triton_driver.py` | Triton's launches |
"""
