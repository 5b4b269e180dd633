"""What a run left of a step, for `shardwise draw`: measured beside predicted. Knows the files of a run; writes none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.schedule import Timeline, draw
from shardwise.schedule.recording import Recording, recordings_in
from shardwise.schedule.svg import Panel
from shardwise.schedule.waits import waits

__all__ = ["panels_of", "recording_of", "timelines_of", "words_of"]

_COLUMNS = 100  # of the longest timeline, where nobody says


def recording_of(folder: Path, step: int | None) -> Recording:
    """A step that a run recorded, the last if not given. Raises ConfigError where there is none, ScheduleError."""
    found = recordings_in(folder / "timelines") or recordings_in(folder)
    if not found:
        raise ConfigError(
            f"a run leaves the timelines of some steps in its folder, but {folder} holds none; train with "
            "timeline.every or timeline.steps (steps of pipedream-2bw overlap and are not recorded), or name another"
        )
    chosen = max(found) if step is None else step
    if chosen not in found:
        raise ConfigError(
            f"a step is drawn that was recorded, but step {chosen} was not; those of {folder} are "
            f"{', '.join(map(str, sorted(found)))}"
        )
    return Recording.read(found[chosen])


def panels_of(recording: Recording) -> list[Panel]:
    """Measured, from its own costs, and by the plan where there was one."""
    name = f"{recording.schedule.name}, step {recording.step + 1}"
    panels = [
        Panel(title=f"{name}, measured", timeline=recording.slowest),
        Panel(title="predicted from the costs of this step", timeline=recording.simulated),
    ]
    if recording.planned is not None:
        panels.append(Panel(title="predicted by the plan", timeline=recording.planned))
    return panels


def timelines_of(recording: Recording) -> Mapping[str, Timeline]:
    """Every pipeline that was measured, and the prediction, by name."""
    measured = {f"pipeline {index}": timeline for index, timeline in enumerate(recording.measured)}
    return {**measured, "predicted": recording.simulated}


def words_of(recording: Recording, width: int | None) -> str:
    """The drawings one above the other on one scale, and where the time of each rank went."""
    parts = [f"{recording.layout}: {recording.schedule}", ""]
    longest = max(panel.timeline.seconds for panel in panels_of(recording))
    for panel in panels_of(recording):
        columns = (width or _COLUMNS) if not longest else round((width or _COLUMNS) * panel.timeline.seconds / longest)
        rows, _, rest = draw(panel.timeline, width=max(columns, 1)).partition("\n\n")
        parts += [f"{panel.title}: {str(panel.timeline).partition(', ')[2]}", rows, ""]
    parts += [rest.rpartition("\n")[0], "", "         computes   waits for others   for transfers and the runtime"]
    for rank, each in enumerate(waits(recording.slowest, recording.edges)):
        shares = [100 * seconds / (each.seconds or 1.0) for seconds in (each.busy_s, each.bubble_s, each.exposed_s)]
        parts.append(f"rank {rank:<3} {shares[0]:7.1f} % {shares[1]:16.1f} % {shares[2]:20.1f} %")
    if len(recording.measured) > 1:
        seconds = ", ".join(f"{timeline.seconds:.4g}" for timeline in recording.measured)
        parts += ["", f"drawn is the slowest of {len(recording.measured)} pipelines, which took {seconds} s"]
    return "\n".join([*parts, "", str(recording)])
