"""Writes docs/schedules.md and its pictures: every schedule generated, checked, simulated and drawn by shardwise.

    python docs/render_schedules.py             after a change of a schedule or of a drawing
    python docs/render_schedules.py --search    searches for the schedule of the last example anew, too

Figures are those of the simulator, formulas those that stand beside each generator. What cannot be computed again, a
measured run and a schedule that was searched for, is read from docs/schedules/*.json.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shardwise.schedule import (
    GENERATORS,
    Costs,
    Kind,
    Schedule,
    Timeline,
    TransferKind,
    chain,
    check,
    chunks_of,
    draw,
    generate,
    simulate,
    with_transfers,
)
from shardwise.schedule.memory import Memory, peak_bytes
from shardwise.schedule.pipedream_2bw import NAME as TWO_VERSIONS
from shardwise.schedule.pipedream_2bw import unrolled
from shardwise.schedule.placement import Placement, stages_of_ranks
from shardwise.schedule.recording import Recording
from shardwise.schedule.search import search, textbooks
from shardwise.schedule.svg import Panel, Unit, to_svg

DOCS = Path(__file__).parent
FOLDER = DOCS / "schedules"
RANKS, MICRO_BATCHES = 4, 8
FORWARDS = Unit(name="F")
COLUMNS = 132  # of drawings as text

# The example of a search: two stages a rank in a V, rank 1 is slower, room for fewer micro-batches than 1F1B's.
SLOWER = (1.0, 1.3, 1.0, 1.0)  # [r]: ms of F, of I and of W for rank r's share of the model
TRANSFER = 0.2  # ms
ROOM = 3  # micro-batches of a rank's share
V_RANKS = stages_of_ranks(Placement.V, num_ranks=RANKS, chunks=2)
V_SECONDS = tuple(SLOWER[r] / 2 for _, r in sorted((s, r) for r, stages in enumerate(V_RANKS) for s in stages))
UNEVEN = Costs(
    compute_seconds={
        Kind.F: V_SECONDS,
        Kind.I: V_SECONDS,
        Kind.W: V_SECONDS,
        Kind.B: tuple(2 * seconds for seconds in V_SECONDS),
    },
    activation_seconds=dict.fromkeys(chain(2 * RANKS), TRANSFER),
    gradient_seconds=dict.fromkeys(chain(2 * RANKS), TRANSFER),
)
LIMIT = Memory(activation_bytes=(0.5,) * 2 * RANKS, weight_bytes=(0.5,) * 2 * RANKS, limit_bytes=(float(ROOM),) * RANKS)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A schedule on equal ranks whose share of the model takes F = I = W = 1 a micro-batch, with free transfers."""

    name: str
    schedule: Schedule
    timeline: Timeline
    in_flight: tuple[float, ...]  # [r], in micro-batches of a rank's share of the model
    messages: int  # that cross ranks in a step

    @classmethod
    def of(cls, name: str) -> Figures:
        chunks = chunks_of(name)
        if name == TWO_VERSIONS:
            schedule = unrolled(num_ranks=RANKS, num_micro_batches=RANKS, num_steps=3)
        else:
            schedule = generate(name, num_ranks=RANKS, num_micro_batches=MICRO_BATCHES, chunks=chunks)
        sent = [
            item
            for row in with_transfers(schedule, chain(schedule.num_stages))
            for item in row
            if getattr(item, "kind", None) is TransferKind.SEND
        ]
        return cls(
            name=name,
            schedule=schedule,
            timeline=simulate(
                schedule, costs=Costs.uniform(schedule.num_stages, forward=1 / chunks, backward=2 / chunks)
            ),
            in_flight=tuple(peak / chunks for peak in check(schedule).peak_per_rank),
            messages=len(sent),
        )


def render() -> Mapping[str, str]:
    """The files by their name below docs/."""
    all_figures = [Figures.of(name) for name in GENERATORS]
    files = {f"schedules/{each.name}.svg": _picture(each) for each in all_figures}
    found = Schedule.from_json((FOLDER / "searched.json").read_text(encoding="utf-8"))
    files["schedules/searched.svg"] = to_svg(_searched_panels(found), unit=Unit(name="ms"))
    recording = Recording.from_json((FOLDER / "measured.json").read_text(encoding="utf-8"))
    files["schedules/measured.svg"] = to_svg(_measured_panels(recording))
    page = (DOCS / "schedules" / "page.md").read_text(encoding="utf-8")
    texts = {
        "table": "\n".join(_table(all_figures)),
        "schedules": "\n".join(line for each in all_figures for line in _section(each)),
        "searched": textwrap.fill(_searched_text(found), 120),
        "measured": textwrap.fill(str(recording), 120),
    }
    for name, text in texts.items():
        page = page.replace(f"{{{{{name}}}}}", text)
    return {"schedules.md": page, **files}


def _picture(figures: Figures) -> str:
    title = GENERATORS[figures.name].about.title
    if figures.name == TWO_VERSIONS:
        title = f"{title}, three steps of {RANKS} micro-batches that are not drained in between"
    return to_svg(figures.timeline, title=title, unit=FORWARDS)


def _table(all_figures: list[Figures]) -> Iterator[str]:
    yield "| schedule | stages a rank | step | bubble | most in flight on ranks 0 to 3 | messages | backward |"
    yield "|---|--:|--:|--:|---|--:|---|"
    for each in all_figures:
        if each.name == TWO_VERSIONS:
            continue
        about = GENERATORS[each.name].about
        kinds = {getattr(action, "kind", None) for row in each.schedule.actions for action in row}
        split = "split" if Kind.W in kinds else "whole"
        yield (
            f"| [{about.title}](#{each.name}) | {chunks_of(each.name)} | {each.timeline.seconds:g} F | "
            f"{100 * each.timeline.bubble_fraction:.1f} % | {_numbers(each.in_flight)} | {each.messages} | {split} |"
        )


def _section(figures: Figures) -> Iterator[str]:
    about = GENERATORS[figures.name].about
    yield f'<a id="{figures.name}"></a>'
    yield ""
    yield f'### {about.title}: `schedule = "{figures.name}"`'
    yield ""
    yield f"![{about.title}: who computes what when](schedules/{figures.name}.svg)"
    yield ""
    yield "| | formula | here |"
    yield "|---|---|---|"
    of = "three steps" if figures.name == TWO_VERSIONS else f"{figures.timeline.seconds:g} F"
    yield f"| idle | {about.bubble} | {100 * figures.timeline.bubble_fraction:.1f} % of {of} |"
    yield f"| kept | {about.memory} | {_numbers(figures.in_flight)} micro-batches |"
    yield f"| sent | {about.traffic} | {figures.messages}{' in three steps' if of == 'three steps' else ''} |"
    yield ""
    yield f"Source: {about.source}."
    yield ""
    yield "```"
    yield draw(figures.timeline, width=min(COLUMNS, len(draw(figures.timeline).partition("\n")[0]) - 8))
    yield "```"
    yield ""


def _searched_panels(found: Schedule) -> list[Panel]:
    name, textbook = best_textbook()
    return [
        Panel(title=f"{GENERATORS[name].about.title}, the best textbook schedule that fits", timeline=textbook),
        Panel(title="searched", timeline=simulate(found, costs=UNEVEN)),
    ]


def _searched_text(found: Schedule) -> str:
    name, textbook = best_textbook()
    timeline = simulate(found, costs=UNEVEN)
    gain = textbook.seconds / timeline.seconds - 1
    return (
        f"The best textbook schedule that fits, {GENERATORS[name].about.title}, takes {textbook.seconds:.4g} ms "
        f"and the one that was found {timeline.seconds:.4g} ms: {100 * gain:.0f} % faster. The busiest rank computes "
        f"for {max(timeline.busy_seconds):.4g} ms of it. Kept on ranks 0 to 3: {_numbers(peak_bytes(found, LIMIT))} "
        "micro-batches."
    )


def best_textbook() -> tuple[str, Timeline]:
    """The fastest generator of that placement that fits."""
    fitting = {
        schedule.name: simulate(schedule, costs=UNEVEN)
        for schedule in textbooks(V_RANKS, MICRO_BATCHES)
        if max(peak_bytes(schedule, LIMIT)) <= ROOM
    }
    best = min(fitting, key=lambda name: fitting[name].seconds)
    return best, fitting[best]


def _measured_panels(recording: Recording) -> list[Panel]:
    return [
        Panel(title=f"{recording.schedule.name} measured", timeline=recording.slowest),
        Panel(title="predicted from the costs of the step", timeline=recording.simulated),
    ]


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def searched_schedule() -> Schedule:
    """What a search finds for the uneven example."""
    return search(UNEVEN, num_micro_batches=MICRO_BATCHES, ranks=V_RANKS, memory=LIMIT, seconds=20.0).schedule


def main() -> None:
    if "--search" in sys.argv[1:]:
        (FOLDER / "searched.json").write_text(searched_schedule().to_json() + "\n", encoding="utf-8")
    for name, text in render().items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
