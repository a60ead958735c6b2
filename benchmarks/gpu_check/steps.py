"""The steps, in their order: what each runs, and for how long it may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.test_heads import HEADS, STEPS

# One case of every test of these comes first, ours before PyTorch's: kernels on their own, what only a GPU has, and values,
# gradients and expectations through a head.
DECIDING = (
    "tests/backends/test_gpu.py",
    "tests/backends/test_row_kernels.py",
    "tests/ops/test_linear_exact.py",
    "tests/ops/test_linear_unbiased.py",
    "tests/ops/test_linear_statistics.py",
    "tests/ops/test_linear_invariance.py",
)
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """Where the steps run, and at which sizes."""

    device: str
    heads: tuple[Size, ...]
    deciding: tuple[str, ...]  # arguments of pytest
    rest: tuple[str, ...]
    races: tuple[str, ...]  # arguments of pytest for all that is timed through a head
    users: tuple[str, ...]  # and at the shapes of benchmarks.users
    training: tuple[str, ...]  # of benchmarks.training
    budget: float  # seconds for the rounds of a race

    @staticmethod
    def of(device: str) -> Plan:
        """On a GPU the sizes of users; on the CPU, where the steps are only tried out, some that take seconds."""
        if device != "cpu":
            gpu = ("-m", "gpu")
            ways = ("--ways", "4,sequential")
            return Plan(device, HEADS, (*gpu, *DECIDING), (*gpu, "tests"), (), ("--own",), ways, 1.0)
        races = ("--contestants", "eager,linear_cross_entropy,trl chunked,liger scaled")  # whoever does not compile
        users = ("--own", "--threads", "1", "-k", "architecture", "--contestants", "eager")
        training = ("--vocab", "1000", "--length", "4", "--ways", "1", "--rounds", "1")
        tests = "tests/backends/test_selection.py"
        deciding = (f"{tests}::test_status_lists_all",)
        return Plan(device, ((8, 16, 100),), deciding, (tests,), races, users, training, 0.0)


@dataclass(frozen=True)
class Step:
    """One process, or for tests one after another until all have had their turn."""

    name: str  # of its files, and on the command line
    kind: str  # doctor, tests, race or training
    command: tuple[str, ...]  # arguments of Python; {folder} is the step's own, {tests} the ledger of all tests
    limit: float  # seconds


def steps(plan: Plan) -> list[Step]:
    """All steps of a plan."""
    race = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", plan.device, "--output", "{folder}")
    race += ("--trial", "{folder}/trial", "--budget", str(plan.budget))
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_check.ledger", "--ledger", "{tests}")
    found = [
        Step("doctor", "doctor", ("-m", "grade_kernels.cli", "doctor"), 90),
        Step("tests that decide", "tests", (*tests, *plan.deciding), 240),
    ]
    for size in plan.heads:
        name = "x".join(map(str, size))
        for op in STEPS:
            what = ("benchmarks/test_heads.py::test_heads", "--heads", name, "-k", op, "--peaks", *plan.races)
            found.append(Step(f"{op} {name}", "race", (*race, *what), 150))
    found.append(Step("rows", "race", (*race, "benchmarks/test_users.py::test_users", *plan.users), 180))
    training = ("-m", "benchmarks.training", "--device", plan.device, "--json", "{folder}/training.json")
    found.append(Step("training step", "training", (*training, *plan.training), 150))
    return [*found, Step("rest of the tests", "tests", (*tests, *plan.rest), 3600)]


def file_name(step: Step) -> str:
    return step.name.replace(" ", "-")


def filled(step: Step, folder: Path, ledger: Path) -> list[str]:
    """The command with its paths."""
    return [part.replace("{folder}", str(folder)).replace("{tests}", str(ledger)) for part in step.command]
