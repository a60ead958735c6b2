"""Fused Triton kernels, for any device with an active Triton driver and for the CPU through Triton's interpreter.

`availability`, `backend`, `parts` and `sizes` do not import Triton, the others do. `targets` knows the device, `philox`
makes noise. Rows of given logits are cut into `strips`; `sampling`, `onehot`, `relaxation` and `gradient` hold their
kernels. Short rows, and rows whose tokens do not lie side by side, come in `row_tiles`, several to a program;
`row_relaxation` and `row_gradient` hold theirs. `parts` cuts what is read twice to the cache's size. Logits that a head
makes come in `head_tiles`, which `head_sampling` and `head_relaxation` consume. `head_support` schedules their launches and
decides what becomes of candidates. `head_chunks` has the library make the logits instead, and `head_choice` finds out which
is faster. `head_ptx` holds what these kernels do rarely. `gather` serves the sparse backward.

Names in kernels begin with what a thing is:

| prefix | what it is | example |
|---|---|---|
| `i_` | an index: of a program, of a loop's round, of a row, of a token | `i_n`, `i_t` |
| `o_` | a block of offsets | `o_v`, tokens `[BN]` |
| `p_` | a pointer, or a block of pointers | `p_row` |
| `s_` | a stride | `s_wv`, of the weight along tokens |
| `m_` | a mask, never anything else | `m_n`, rows that exist |
| `b_` | a block of values, or a tuple of such blocks | `b_max` |
| `r_` | one value for each row: a scalar where a program has one row, `[BM]` or `[BM, 1]` where it has BM | `r_max` |

The letters behind the prefix say of what: `n` row, `v` token, `k` step of the width or entry of a support, `s` split, `t`
tile or strip, `l` logits; in `row_tiles`, `a` and `b` place of a row along A and B, `j` slot. Constants of the compiler are
upper case. No prefix have a kernel's own parameters (tensors as the launcher calls them, numbers), counts and bounds that a
program shares (`first`, `splits`, `capacity`), and the noise contract's counter and key (`row_lo`, `row_hi`, `k0`, `k1`),
of which the four together are a row's `stream`. `philox` is mathematics and keeps the letters of the contract.

Launchers pass arguments by keyword. A block's shape stands beside its load.
"""
