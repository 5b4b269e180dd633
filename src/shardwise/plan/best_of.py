"""The best layouts of a space by an objective: closed forms first, then the best of these simulated, which decides.

Where a simulation shows that a layout does not fit after all, what it had put aside is looked at again. A front comes
from the fastest layouts below several caps on memory (the epsilon-constraint method, Haimes 1971). Refuses to know how
prices are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardwise.plan.budget import within_budget
from shardwise.plan.explore import Explorer
from shardwise.plan.pareto import front_of
from shardwise.plan.ranked import Objective, Ranked, value_of

__all__ = ["best_of"]

_REFINED = 5  # layouts that are simulated, at least
_MOST_REFINED = 6
_ROUNDS = 4  # of looking again
_CAPS = (0.85, 0.7, 0.55, 0.4, 0.25, 0.12)  # of a device's memory


def best_of(explorer: Explorer, objective: Objective, *, top: int, most: int) -> tuple[tuple[Ranked, ...], bool]:
    """The `top` best (all of a front), simulated, with their margins, none where nothing fits; and whether no other can
    be among them."""
    fronts = objective in (Objective.PARETO, Objective.PARETO_COST)
    complete, chosen = False, list[Ranked]()
    for _ in range(_ROUNDS):
        complete = _explore(explorer, objective, top=top, most=most)
        rows = [row for row, ranked in explorer.priced.items() if explorer.may_be_chosen(ranked)]
        chosen, demoted = _front(explorer, rows, objective) if fronts else _first(explorer, rows, objective, top)
        if not demoted:
            break
    if not chosen:
        return (), complete
    best = value_of(chosen[0], objective)
    return tuple(
        dataclasses.replace(ranked, margin=value_of(ranked, objective) / best - 1 if best else 0.0) for ranked in chosen
    ), complete


def _explore(explorer: Explorer, objective: Objective, *, top: int, most: int) -> bool:
    coarse, more = explorer.coarse, max(top, _REFINED)
    if objective is Objective.MEMORY:
        return explorer.explore(_peak, coarse.about_bytes, top=more, most=most, dominated=False)
    if objective is Objective.COST:
        return explorer.explore(_usd, coarse.seconds * explorer.usd_rates(), top=more, most=most)
    complete = explorer.explore(_seconds, coarse.seconds, top=more, most=most)
    if objective is Objective.PARETO_COST:
        dollars = coarse.seconds * explorer.usd_rates()
        return explorer.explore(_usd, dollars, top=more, most=most) and complete
    for cap in _CAPS if objective is Objective.PARETO else ():
        own = explorer.explore(_seconds, coarse.seconds, top=2, most=most // 4, cap=cap, dominated=False)
        complete = complete and own
    return complete


def _first(explorer: Explorer, rows: list[int], objective: Objective, top: int) -> tuple[list[Ranked], bool]:
    """The first `top` rows, simulated until no further one can be among them, by how much less than its closed form one
    was at least; and whether one does not fit then."""
    refined: list[Ranked] = []
    demoted, least = False, 1.0
    for row in sorted(rows, key=lambda row: value_of(explorer.priced[row], objective)):
        closed = value_of(explorer.priced[row], objective)
        if len(refined) >= max(top, _REFINED):
            worst = sorted(value_of(each, objective) for each in refined)[top - 1]
            if len(refined) >= max(top, _MOST_REFINED) or closed * least > worst:
                break
        exact = explorer.refine(row)
        least = min(least, value_of(exact, objective) / closed)
        if explorer.may_be_chosen(exact):
            refined.append(exact)
        else:
            demoted = True
    if objective is not Objective.MEMORY:
        refined = [within_budget(ranked, explorer.pricer) or ranked for ranked in refined]
    return sorted(refined, key=lambda ranked: value_of(ranked, objective))[:top], demoted


def _front(explorer: Explorer, rows: list[int], objective: Objective) -> tuple[list[Ranked], bool]:
    """The front of simulated rows; and whether one of them does not fit then."""
    second: Callable[[Ranked], float] = _usd if objective is Objective.PARETO_COST else _peak
    of_row = {id(explorer.priced[row]): row for row in rows}
    closed = front_of([explorer.priced[row] for row in rows], second)
    exact = [explorer.refine(of_row[id(ranked)]) for ranked in closed]
    fitting = [ranked for ranked in exact if explorer.may_be_chosen(ranked)]
    return front_of(fitting, second), len(fitting) < len(exact)


def _seconds(ranked: Ranked) -> float:
    return ranked.price.step_s


def _peak(ranked: Ranked) -> float:
    return ranked.peak_bytes


def _usd(ranked: Ranked) -> float:
    return ranked.usd or 0.0
