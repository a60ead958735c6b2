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
| `cuda_library.py`, `recorded/` | launches of csrc/cuda, compiled by nvcc |
| `snippets.py` | a few instructions as a kernel, for tests of the simulator |
| `record.py`, `setting.py` | what a run executed, as a file; whether a process simulates |

What it is not: a model of time, of caches or of the order in which blocks run. Sums of `mma` are exact and rounded once; a
GPU cuts bits off. Approximate instructions give the nearest number; a GPU may be some units of the last place beside it. Two
writes of one value by two threads are no race: Triton stores what several lanes hold from all of them.

Hopper's `wgmma` and its bulk copies are not covered: for sm_90 Triton makes other products and other waits from the same
source. What stands around them is: Philox, the refinement, candidates and reductions are the same source, and the blocks of
PTX (`head_ptx.py`) are the same text, executed here as they stand between Triton's own instructions, with their votes,
ballots and shuffles.
"""
