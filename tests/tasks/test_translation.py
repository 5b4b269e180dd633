"""Translation: pairs become tokens, a loss, and translations with a score."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from shardwise.errors import ConfigError
from shardwise.tasks import Played, Score, Scored, Split, Translation, prepare_task, task_from
from shardwise.tasks.pairs import Pair, words_of
from shardwise.tasks.translation import PreparedTranslation
from shardwise.tasks.translation_score import translation_score

WORDS = {"cat": "Katze", "dog": "Hund", "house": "Haus", "file": "Datei", "row": "Zeile", "key": "Taste", "sea": "See"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pairs of words that are translated one by one: of one to four words."""
    texts = [[first] for first in WORDS] + [
        [a, b, c, a][: 2 + (len(a) + len(b)) % 3] for a in WORDS for b in WORDS for c in WORDS
    ]
    unlike = [list(text) for text in dict.fromkeys(map(tuple, texts))]
    (tmp_path / "words.en").write_text("".join(f"{' '.join(text)}\n" for text in unlike))
    (tmp_path / "words.de").write_text("".join(f"{' '.join(WORDS[word] for word in text)}\n" for text in unlike))
    return tmp_path


def task(folder: Path, **more: object) -> Translation:
    told = {"cache": str(folder / "cache"), "data": str(folder), "vocabulary_size": 300, "pad_to": 4, "rows": 8}
    made = task_from("translation", prepare_task("translation", {**told, **more}))
    assert isinstance(made, Translation)
    return made


def texts(made: Translation, split: Split, side: str) -> list[str]:
    live = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    rows = {"source": made.sources, "target": made.targets}[side][split]
    return [live.decode(rows.row(i).tolist()).strip() for i in range(rows.num_rows)]


def test_samples_are_tokens_of_both_texts_and_the_end(data: Path) -> None:
    made = task(data)
    assert made.num_samples("train") > 50
    batch = made.samples([0, 1, 2], "train")
    assert {name: tensor.shape[0] for name, tensor in batch.items()} == dict.fromkeys(batch, 3)
    assert batch["input_ids"].shape[1] % 4 == batch["target_labels"].shape[1] % 4 == 0
    known = made.summary
    for row in range(3):
        source = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        target = batch["target_labels"][row][batch["target_labels"][row] != -100].tolist()
        assert source == made.sources["train"].row(row).tolist()
        assert source[-1] == target[-1] == known.end
        assert batch["decoder_input_ids"][row][: len(target)].tolist() == [known.start, *target[:-1]]
    assert made.weight(batch) == (batch["target_labels"] != -100).sum()
    with pytest.raises(ConfigError, match="samples of train are numbered"):
        made.samples([10**6], "train")


def test_both_languages_come_back_from_their_tokens_and_no_held_out_source_is_trained_on(data: Path) -> None:
    made = task(data, held_out_fraction=0.3)
    told = dict(zip(texts(made, "train", "source"), texts(made, "train", "target"), strict=True))
    assert all(target == " ".join(WORDS[word] for word in source.split()) for source, target in told.items())
    held_out = made.pairs("held_out")
    assert texts(made, "held_out", "source") == [pair.source for pair in held_out]
    assert held_out
    assert not {words_of(pair.source) for pair in held_out} & set(map(words_of, told))
    with pytest.raises(ConfigError, match="texts are kept of held-out pairs alone"):
        made.pairs("train")


def test_the_loss_smooths_labels_as_torch_does_and_as_by_hand(data: Path) -> None:
    made = task(data, label_smoothing=0.2)
    batch = made.samples([0, 1, 2, 3], "train")
    logits = torch.randn(
        *batch["target_labels"].shape, made.vocabulary_size, generator=torch.Generator().manual_seed(0)
    )
    found = made.loss({"loss": torch.tensor(99.0), "logits": logits}, batch)
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["target_labels"].flatten(), label_smoothing=0.2
    )
    torch.testing.assert_close(found, wanted)
    log_p, counted = logits.log_softmax(-1), batch["target_labels"] != -100
    own = log_p.gather(-1, batch["target_labels"].clamp(min=0)[..., None])[..., 0]
    by_hand = -(0.8 * own + 0.2 * log_p.mean(-1))[counted].mean()
    torch.testing.assert_close(found, by_hand)
    nothing = {**batch, "target_labels": torch.full_like(batch["target_labels"], -100)}
    assert made.loss(logits, nothing) == 0
    assert made.loss(logits.to(torch.bfloat16), batch).dtype == torch.float32


def test_a_step_has_pairs_of_like_lengths_and_an_epoch_all_of_them(data: Path) -> None:
    made = task(data, alike=4)
    count = made.num_samples("train")
    seen = [made.indices(seed=1, step=step, global_batch=8) for step in range(count // 8)]
    assert len({index for indices in seen for index in indices}) > 0.9 * count - 8 * 4
    shapes = {
        tuple(made.samples(indices, "train")[name].shape[1] for name in ("input_ids", "target_labels"))
        for indices in seen
    }
    assert len(shapes) > 1
    spread = [len({made.sources["train"].lengths[i] // 4 for i in indices}) for indices in seen]
    assert sum(spread) / len(spread) < 1.7


def played(made: Translation, translate: Any) -> tuple[Score, int]:
    """The score of a model that says what `translate` makes of a text, and how often it was asked."""
    live = Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    known, game, asked = made.summary, made.play("held_out"), 0
    try:
        batch = next(game)
        while True:
            asked += 1
            assert set(batch) == set(made.samples([0], "train"))
            rows, places = batch["target_labels"].shape
            logits = torch.zeros(rows, places, known.vocabulary_size)
            for row in range(rows):
                source = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
                said = [*live.encode(" " + translate(live.decode(source).strip())).ids, known.end]
                for place in range(places):
                    right = batch["decoder_input_ids"][row, 1 : place + 1].tolist() == said[:place]
                    logits[row, place, said[place] if right and place < len(said) else known.end] = 1
            batch = game.send(made.replies({"logits": logits}, batch))
    except StopIteration as end:
        return end.value, asked


def test_an_evaluation_translates_held_out_pairs_and_scores_them(data: Path) -> None:
    made = task(data, held_out_fraction=0.1, translated=12)
    assert isinstance(made, Played)
    assert not isinstance(made, Scored)
    right, asked = played(made, lambda text: " ".join(WORDS[word] for word in text.split()))
    assert right.figures["bleu"] == pytest.approx(100)
    assert right.figures["chrf"] == pytest.approx(100)
    assert right.figures["bleu_of_copying"] < 10
    assert asked < 60
    assert "BLEU" not in right.report
    assert "nrefs:1|case:mixed" in right.report
    assert f"source       {made.pairs('held_out')[0].source}" in right.report
    copied, _ = played(made, lambda text: text)
    assert copied.figures["bleu"] == pytest.approx(right.figures["bleu_of_copying"])


def test_the_score_is_sacrebleus() -> None:
    pairs = [Pair(source="the cat sat on the mat", target="die Katze saß auf der Matte")]
    score = translation_score(pairs, ["die Katze saß auf einer Matte"])
    assert score.figures["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert 60 < score.figures["chrf"] < 95
    assert score.figures["bleu_of_copying"] < 10
    assert translation_score([], []).figures == {"bleu": 0.0, "chrf": 0.0, "bleu_of_copying": 0.0}


def test_the_head_gives_sizes_and_tokens_to_a_model_without_values(data: Path) -> None:
    made = pickle.loads(pickle.dumps(task(data, label_smoothing=0.0)))
    assert made.how.label_smoothing == 0.0
    head, known = made.head(), made.summary
    assert head.family == "AutoModelForSeq2SeqLM"
    assert head.inputs["vocab_size"] == head.inputs["decoder_vocab_size"] == known.vocabulary_size <= 300
    assert (head.inputs["pad_token_id"], head.inputs["eos_token_id"]) == (known.padding, known.end)
    assert head.config == {"decoder_start_token_id": known.start}
    assert known.start == known.padding != known.end


def test_a_loaded_tokenizer_keeps_its_tokens_and_config_says_what_they_mean(data: Path) -> None:
    folder = data / "model"
    folder.mkdir()
    words = ["<s>", "<pad>", "<stop>", "<unk>", *WORDS, *WORDS.values()]
    live = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    live.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    live.post_processor = processors.BertProcessing(("<stop>", 2), ("<s>", 0))
    live.add_special_tokens(words[:3])
    live.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}))
    made = task(data, tokenizer=str(folder))
    known = made.summary
    assert (known.start, known.end, known.padding, known.vocabulary_size) == (2, 2, 1, len(words))
    assert made.sources["train"].row(0)[0] == 0  # <s> cat </s>, as the tokenizer writes it
    assert made.sources["train"].row(0).tolist().count(2) == 1
    right, _ = played(made, lambda text: " ".join(WORDS[word] for word in text.split()))
    assert right.figures["bleu"] == pytest.approx(100)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="a model config is a JSON object"):
        task(data, tokenizer=str(folder))
    (folder / "config.json").unlink()
    assert task(data, tokenizer=str(folder)).summary.start == 1  # the padding


def test_wrong_options_and_data_are_told_before_any_process_starts(data: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing lies in"):
        task(data, label_smoothing=1.0)
    with pytest.raises(ConfigError, match="pad_to=0"):
        task(data, pad_to=0)
    with pytest.raises(ConfigError, match="vocabulary_size=200 is too small; use 258 or more"):
        task(data, vocabulary_size=200)
    with pytest.raises(ConfigError, match="at most max_tokens=2 tokens on each side, but all"):
        task(data, max_tokens=2, vocabulary_size=258)
    with pytest.raises(ConfigError, match=r"write task\.held_out_fraction|no option"):
        task(data, held_out_fractions=0.1)
    (data / "words.de").write_bytes((data / "words.en").read_bytes())
    with pytest.raises(ConfigError, match=r"of 188 none is left \(\d+ equal"):
        task(data)
    with pytest.raises(ConfigError, match="pairs are opened from a folder that was prepared"):
        Translation.open(PreparedTranslation(folder=str(data)))
