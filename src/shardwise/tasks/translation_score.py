"""How good translations are: BLEU and chrF beside one human translation each, by sacrebleu.

It knows texts; it refuses to know tokens and models.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.errors import ConfigError
from shardwise.tasks.pairs import Pair
from shardwise.tasks.scored import Score

__all__ = ["check_sacrebleu", "translation_score"]

_SHOWN = 5  # translations in a report


def translation_score(pairs: Sequence[Pair], translations: Sequence[str]) -> Score:
    """`bleu` and `chrf` of the translations (0 to 100), and `bleu_of_copying`, that of the sources left as they are.

    BLEU of the corpus (Papineni et al. 2002; Post 2018 for how words are told apart), and chrF2 (Popović 2015); the
    report has the signatures that say how they were counted, and the first translations. Raises ConfigError where
    sacrebleu is missing.
    """
    check_sacrebleu()
    from sacrebleu import BLEU, CHRF

    bleu, chrf = BLEU(), CHRF()
    human = [[pair.target for pair in pairs]]
    found = list(translations)
    lines = []
    figures = {}
    for name, metric in (("bleu", bleu), ("chrf", chrf)):
        figures[name] = float(metric.corpus_score(found, human).score) if found else 0.0
        lines.append(f"{metric.get_signature() if found else ''}  {name} {figures[name]:.2f}".strip())
    figures["bleu_of_copying"] = float(bleu.corpus_score([p.source for p in pairs], human).score) if found else 0.0
    for pair, translation in zip(pairs[:_SHOWN], found, strict=False):
        lines += ["", f"source       {pair.source}", f"translation  {translation}", f"by a human   {pair.target}"]
    return Score(figures=figures, report="\n".join(lines))


def check_sacrebleu() -> None:
    """Raise ConfigError where sacrebleu is missing."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "translations are scored by sacrebleu, which is not installed; run: pip install 'shardwise[tasks]'"
        ) from error
