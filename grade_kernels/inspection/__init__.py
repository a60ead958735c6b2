"""What the Triton kernels compile to and move, known without a GPU.

`inspect` compiles them ahead of time and reads the machine code; `predict` turns what it found into times, which are
predictions; `traffic` counts the bytes that kernels load and store in Triton's interpreter. The command is
`grade-kernels inspect`, and docs/kernels.md says how to read its report.
"""

from grade_kernels.inspection.inspector import inspect, select
from grade_kernels.inspection.machine_code import Figures

__all__ = ["Figures", "inspect", "select"]
