"""What `mmft data check` found, as a person reads it: in a terminal, as one HTML page, and as lines of JSON.

Whatever comes from the data goes through `visible()`, and through the template's escaping on the page.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from rich.text import Text as Styled

from mmft.data.headers import ImageReport
from mmft.data.measure import Histogram
from mmft.data.store import Drop, reason_kind
from mmft.data.visible import one_line, visible

BAR = 40  # characters of the longest bar
MAX_SHOWN = 50  # records and images listed on the page; all of them are in the .jsonl files


@dataclass(frozen=True)
class Outcome:
    """What happened to `count` records or images for one kind of reason; `first` is one of them, in full."""

    action: str
    reason: str
    count: int
    first: str


@dataclass(frozen=True)
class CheckReport:
    """Everything that was found. `problems` are why a run would fail or learn the wrong thing; none: all is well."""

    subject: str
    facts: tuple[tuple[str, str], ...]
    outcomes: tuple[Outcome, ...] = ()
    lengths: Histogram | None = None
    images: ImageReport = field(default_factory=ImageReport)
    bad_images: tuple[Outcome, ...] = ()
    proof: tuple[str, ...] = ()  # differences between the template and the model's own
    problems: tuple[str, ...] = ()
    drops: Sequence[Drop] = ()
    unopened: int = 0  # images that nobody said where to look for

    @property
    def verdict(self) -> str:
        """What is said where there is no problem, without claiming more than was looked at."""
        if not self.unopened:
            return "all of it can be trained on"
        opened = f"none of the {self.unopened:,} pictures was opened: say where they are with --image-folder"
        return f"all records can be trained on, but {opened}"

    @property
    def exit_code(self) -> int:
        """0 where the data can be trained on as it is, else 2."""
        return 2 if self.problems else 0


def count_outcomes(drops: Iterable[Drop]) -> tuple[Outcome, ...]:
    """Drops by action and kind of reason, the most frequent first. Details follow a colon, the kind stands before."""
    counts: dict[tuple[str, str], tuple[int, str]] = {}
    for drop in drops:
        key = drop.action, heading(drop.reason)
        count, first = counts.get(key, (0, str(drop)))
        counts[key] = count + 1, first
    listed = [Outcome(action, reason, count, first) for (action, reason), (count, first) in counts.items()]
    return tuple(sorted(listed, key=lambda o: (o.action, -o.count)))


def heading(reason: str) -> str:
    """The kind of a reason as a sentence that is complete: a clause that only leads to the details is left out.

    `'a' is missing; keys found: 'b'` is `'a' is missing`, and `not JSON (Expecting value: line 1)` is `not JSON`.
    """
    kind = reason_kind(reason)
    if kind == reason:
        return kind
    opened = kind.rfind("(")
    if opened > 0 and ")" not in kind[opened:]:
        kind = kind[:opened].rstrip()
    return kind.rpartition("; ")[0] or kind


def terminal_lines(report: CheckReport) -> Iterator[Styled]:
    """The report, line by line."""
    yield Styled(visible(report.subject), "bold")
    width = max((len(label) for label, _ in report.facts), default=0)
    for label, value in report.facts:
        yield Styled.assemble((visible(f"{label.ljust(width)}  "), "dim"), one_line(value))
    yield from _counted("records", report.outcomes)
    yield from _counted("images", report.bad_images)
    if report.lengths:
        yield Styled(f"\nlength in {visible(report.lengths.unit)}", "bold")
        yield Styled("  ".join(f"{name} {value:,}" for name, value in length_numbers(report.lengths)))
        yield from histogram_lines(report.lengths)
    if report.proof:
        yield Styled(f"\nthe template differs from the model's own in {len(report.proof)} case(s)", "bold red")
        yield from (Styled(visible(difference)) for difference in report.proof)
    yield Styled("")
    if not report.problems:
        yield Styled(f"ok: {report.verdict}", "bold yellow" if report.unopened else "bold green")
    for problem in report.problems:
        yield Styled(f"problem: {visible(problem)}", "bold red")


def _counted(title: str, outcomes: Sequence[Outcome]) -> Iterator[Styled]:
    if outcomes:
        yield Styled(f"\n{title} by reason", "bold")
    for outcome in outcomes:
        yield Styled.assemble(
            f"{outcome.count:>8,}  {outcome.action}: {one_line(outcome.reason)}",
            (f"\n          first: {one_line(outcome.first)}", "dim"),
        )


def length_numbers(lengths: Histogram) -> list[tuple[str, int]]:
    """The quantiles and the mean, named."""
    return [*lengths.quantiles.items(), ("mean", round(lengths.mean))]


def histogram_lines(lengths: Histogram) -> Iterator[Styled]:
    """One bar a line; a bar that is not empty is seen, however short."""
    most = max(count for _, _, count in lengths.bars)
    labels = [f"{low:,}-{high:,}" if low != high else f"{low:,}" for low, high, _ in lengths.bars]
    width = max(map(len, labels))
    for label, (_, _, count) in zip(labels, lengths.bars, strict=True):
        length = max(1, round(BAR * count / most)) if count else 0
        yield Styled.assemble((f"{label.rjust(width)} ", "dim"), ("█" * length, "green"), f" {count:,}")


def write_report(report: CheckReport, folder: Path, page: Path) -> None:
    """Write dropped.jsonl and bad_images.jsonl into the folder, and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "dropped.jsonl", (asdict(drop) for drop in report.drops))
    bad = ({"image": path, "reason": reason} for path, reason in report.images.bad.items())
    _write_lines(folder / "bad_images.jsonl", bad)
    page.write_text(html_page(report), "utf-8")


def _write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", errors="replace") as file:  # a lone surrogate cannot be written
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def html_page(report: CheckReport) -> str:
    """One file without scripts and without network."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, finalize=lambda v: visible(v) if isinstance(v, str) else v)
    template = environment.from_string(files("mmft.data").joinpath("check.html.jinja").read_text("utf-8"))
    most = max((count for _, _, count in report.lengths.bars), default=1) if report.lengths else 1
    return template.render(
        report=report,
        tables=[("Records by reason", report.outcomes), ("Images by reason", report.bad_images)],
        numbers=length_numbers(report.lengths) if report.lengths else [],
        most=most,
        drops=report.drops[:MAX_SHOWN],
        bad=list(report.images.bad.items())[:MAX_SHOWN],
    )
