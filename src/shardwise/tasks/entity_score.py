"""Precision, recall and F1 of entities: a span and its class are found, or not. Counted by seqeval.

It knows tags; it refuses to know tokens and models.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.errors import ConfigError
from shardwise.tasks.scored import Score

__all__ = ["entity_score"]


def entity_score(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> Score:
    """`f1`, `precision` and `recall` over all entities, `accuracy` over words; the report has a line a class.

    Tags are IOB1, IOB2 or IOBES, a sentence each; an entity counts where class and both ends are right (Ramshaw and
    Marcus 1995; `conlleval`). A figure of nothing over nothing is 0. Raises ConfigError where seqeval is missing.
    """
    try:
        from seqeval import metrics
    except ImportError as error:
        raise ConfigError(
            "entities are scored by seqeval, which is not installed; run: pip install 'shardwise[tasks]'"
        ) from error
    told, guessed = [list(tags) for tags in true], [list(tags) for tags in found]
    figures = {
        "f1": metrics.f1_score(told, guessed, zero_division=0),
        "precision": metrics.precision_score(told, guessed, zero_division=0),
        "recall": metrics.recall_score(told, guessed, zero_division=0),
        "accuracy": metrics.accuracy_score(told, guessed),
    }
    report = metrics.classification_report(told, guessed, digits=4, zero_division=0)
    return Score(figures={name: float(value) for name, value in figures.items()}, report=str(report).rstrip())
