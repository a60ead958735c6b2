"""The experiment of arXiv 2601.11574, run again: GRADE and GRADE-STE against REINFORCE and PPO, on equal budgets.

`python -m benchmarks.alignment --task demo` runs it offline; `--help` names the other tasks. What is measured and how
is said where it is done: `methods` (the gradient estimators), `train` (one run), `evaluation`, `variance`, `study` (which
runs there are) and `report` (tables, verdicts, pictures).
"""
