"""Every method by name."""

from __future__ import annotations

from functools import partial

from benchmarks.alignment.methods.base import Method
from benchmarks.alignment.methods.grade import Grade
from benchmarks.alignment.methods.ppo import PPO
from benchmarks.alignment.methods.reinforce import Reinforce

__all__ = ["METHODS", "OURS", "PAPER", "VARIANTS"]

# The methods of the paper's table, with leave-one-out beside plain REINFORCE.
_MAIN = (
    Method("grade_ste", "GRADE-STE", Grade),
    Method("grade", "GRADE (soft)", partial(Grade, estimator="soft")),
    Method("reinforce", "REINFORCE, leave-one-out", partial(Reinforce, baseline=True)),
    Method("reinforce_plain", "REINFORCE, plain", partial(Reinforce, baseline=False)),
    Method("ppo", "PPO", PPO),
)
# One change to GRADE-STE each, and the two best of them together.
_VARIANTS = (
    Method("st", "GRADE, estimator st", partial(Grade, estimator="st")),
    Method("ste_log", "GRADE-STE, log-probability", partial(Grade, log=True)),
    Method("st_log", "GRADE, estimator st, log-probability", partial(Grade, estimator="st", log=True)),
    Method("ste_hops0", "GRADE-STE, 0 hops", partial(Grade, feedback_hops=0)),
    Method("ste_tau0.5", "GRADE-STE, tau 0.5", partial(Grade, tau=0.5)),
    Method("ste_tau2", "GRADE-STE, tau 2", partial(Grade, tau=2.0)),
)
METHODS = {method.name: method for method in (*_MAIN, *_VARIANTS)}
PAPER = tuple(method.name for method in _MAIN)
VARIANTS = tuple(method.name for method in _VARIANTS)
OURS = ("grade_ste", "grade", *VARIANTS)
