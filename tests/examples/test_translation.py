"""The example of translation at tiny size, through the launcher that its command uses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.run import Example, last_figures, main
from shardwise.errors import ConfigError
from shardwise.events import read_events
from tasks.test_catalogues import HEADER, compiled

ENGLISH = ["open", "close", "save", "find", "print", "the file", "a row", "this page", "no key", "all data"]
GERMAN = [
    "öffne",
    "schließe",
    "speichere",
    "finde",
    "drucke",
    "die Datei",
    "eine Zeile",
    "diese Seite",
    "kein",
    "alles",
]


@pytest.fixture
def catalogues(tmp_path: Path) -> list[str]:
    """Two catalogues of a hundred messages of many lengths."""
    pairs = {f"{a} {' and '.join(ENGLISH[j : j + 1 + i % 4])}": f"{GERMAN[i]} {' und '.join(GERMAN[j : j + 1 + i % 4])}"
             for i, a in enumerate(ENGLISH) for j in range(10)}  # fmt: skip
    names = [tmp_path / "first.mo", tmp_path / "second.mo"]
    for place, name in enumerate(names):
        name.write_bytes(compiled({"": HEADER, **dict(list(pairs.items())[50 * place : 50 * place + 50])}))
    return [str(name) for name in names]


SMALL = """training.steps=6 training.warm_up=1 training.global_batch=16 training.evaluate_every=6
    task.vocabulary_size=300 task.held_out_fraction=0.2 task.pad_to=16 task.rows=8 task.translated=8
    task.max_tokens=48 model.config.d_model=16
    model.config.encoder_layers=1 model.config.decoder_layers=1 model.config.encoder_ffn_dim=32
    model.config.decoder_ffn_dim=32 model.config.encoder_attention_heads=2
    model.config.decoder_attention_heads=2""".split()


def test_translation_trains_a_pipeline_and_tells_bleu_and_chrf(catalogues, tmp_path, capsys) -> None:
    values = [f'folder="{tmp_path / "run"}"', "layout=pp=2,micro_batches=2", *SMALL]
    told = main(["translation", "--data", *catalogues, *(part for each in values for part in ("--set", each))])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == told
    assert set(told) == {"example", "bleu", "chrf", "bleu_of_copying", "equal"}
    assert told["bleu_of_copying"] == pytest.approx(
        last_figures(tmp_path / "run" / "events")["bleu_of_copying"], abs=1e-4
    )
    evaluation = next(event for event in read_events(tmp_path / "run" / "events") if event.kind == "evaluation")
    assert "nrefs:1|case:mixed" in str(evaluation.data["report"])


def test_the_example_says_how_to_get_its_catalogues_and_has_a_page(tmp_path: Path) -> None:
    example = Example.read("translation")
    page = (Path("examples") / "translation" / "README.md").read_text(encoding="utf-8")
    assert all(name in page for name in (example.figure, *example.more))
    assert "libreoffice-l10n-de" in page
    with pytest.raises(ConfigError, match="nowhere.mo, which is not there; apt-get install git gcc-12-locales"):
        main(["translation", "--data", str(tmp_path / "nowhere.mo")])
