"""What was found, as a page that can be pasted into an issue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import report
from benchmarks.gpu_check.runner import FAILED, PASSED, WAITING, Result

_MOST = 30  # failed tests that are listed


def page(machine: dict[str, str], results: Sequence[Result]) -> str:
    """The whole page, of all steps in their order."""
    return "\n".join(_lines(machine, results)) + "\n"


def summary(results: Sequence[Result]) -> list[str]:
    """Which steps have passed, failed and not ended."""
    by_state = {state: [r for r in results if r.state == state] for state in (PASSED, FAILED, WAITING)}
    lines = [f"{len(by_state[PASSED])} of {len(results)} steps passed."]
    lines += [f"Failed: {r.name} ({r.why})." for r in by_state[FAILED]]
    if by_state[WAITING]:
        names = ", ".join(r.name for r in by_state[WAITING])
        lines.append(f"Left out so far: {names}. `make gpu-check` again goes on with these.")
    return lines


def _lines(machine: dict[str, str], results: Sequence[Result]) -> Iterator[str]:
    yield f"# gpu-check: {machine['device']}\n"
    yield "| | |\n|---|---|"
    for name, value in machine.items():
        yield f"| {name} | {value} |"
    yield ""
    for line in summary(results):
        yield f"* {line}"
    yield "\n| step | state | seconds | commit |\n|---|---|---|---|"
    for result in results:
        state = f"{result.state}: {result.why}" if result.why else result.state
        yield f"| {result.name} | {state} | {result.seconds:.0f} | {result.commit} |"
    yield ""
    for result in results:
        if result.kind == "doctor" and result.tail:
            yield from _folded("doctor", result.tail)
    yield from _tests([result for result in results if result.kind == "tests" and result.tests])
    races = [result for result in results if result.kind == "race" and (result.rows or result.notes)]
    if races:
        yield "## Time and memory\n"
        yield "The column of ours is a time; every other says how many times as long that contestant took (below 1: it was "
        yield "faster). Each result was compared with the reference in float64 before a time was taken.\n"
        yield from report.figures([row for result in races for row in result.rows])
        yield from _left_out(races)
    for result in results:
        if result.kind == "training" and "ways" in result.notes:
            yield from _training(result)
    for result in results:
        if result.state == FAILED and result.kind != "doctor":
            yield from _folded(f"the end of the log of {result.name}", result.tail)


def _tests(results: Sequence[Result]) -> Iterator[str]:
    if not results:
        return
    yield "## Tests\n"
    yield "| | passed | failed | skipped | not run |\n|---|---|---|---|---|"
    for result in results:
        count = result.tests
        yield f"| {result.name} | {count['passed']} | {count['failed']} | {count['skipped']} | {count['left']} |"
    yield ""
    failed = [(name, why) for result in results for name, why in result.tests["messages"].items()]
    for name, why in failed[:_MOST]:
        yield f"* `{name}`: {' '.join(why.split())[:200]}"
    if len(failed) > _MOST:
        yield f"* and {len(failed) - _MOST} more"
    yield ""


def _left_out(races: Sequence[Result]) -> Iterator[str]:
    """Who took no part: lines that several steps share stand once."""
    lines: dict[str, None] = {}
    for race in races:
        for name, why in race.notes.get("absent", {}).items():
            lines[f"* not raced against: {name}: {why}"] = None
        for entry in race.notes.get("left_out", []):
            lines[f"* left out of {entry['case']}: {entry['name']}: {entry['why']}"] = None
        for name, why in race.notes.get("crashed", {}).items():
            lines[f"* left out of {race.name}: {name}: its process {why}"] = None
    yield from lines
    yield ""


def _training(result: Result) -> Iterator[str]:
    what = result.notes
    yield f"## Training step: {what['case']}, V = {what['vocab']}, {what['batch']} completions of {what['length']} tokens\n"
    yield "| feedback hops | seconds | peak memory, GiB | of it during the step |\n|---|---|---|---|"
    for way, found in what["ways"].items():
        if found is None:
            yield f"| {way} | failed | | |"
        else:
            during = found["peak_gib"] - found["before_gib"]
            yield f"| {way} | {found['seconds']:.3f} | {found['peak_gib']:.2f} | {during:.2f} |"
    yield ""


def _folded(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield f"<details><summary>{title}</summary>\n\n```"
    yield from (line.replace("```", "'''") for line in lines)
    yield "```\n</details>\n"
