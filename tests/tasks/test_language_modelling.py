"""Text on disk becomes packed samples: nothing is lost, splits share nothing, and opening only reads."""

import itertools
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from shardwise.errors import ConfigError
from shardwise.tasks import CorpusOptions, LanguageModelling, Split, sample_indices
from shardwise.tasks.task import IGNORED_LABEL

SEQUENCE_LENGTH = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"document {i}: " + f"{i * i} words and some more\n" * (1 + i % 7))
    return folder


def options(corpus: Path, cache: Path, **changed: object) -> CorpusOptions:
    chosen = {
        "sources": str(corpus),
        "cache": str(cache),
        "sequence_length": SEQUENCE_LENGTH,
        "vocabulary_size": 270,
        "held_out_fraction": 0.2,
    }
    return CorpusOptions(**{**chosen, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LanguageModelling.prepare(options(corpus, tmp_path_factory.mktemp("cache")))


@pytest.fixture
def task(prepared: Path) -> LanguageModelling:
    return LanguageModelling.open(prepared, sequence_length=SEQUENCE_LENGTH)


def documents_of(task: LanguageModelling, split: Split) -> list[str]:
    """The texts, put together again from all samples of a split."""
    found = task.samples(range(task.num_samples(split)), split)["labels"].flatten()
    tokens = found[found != IGNORED_LABEL].tolist()
    tokenizer = Tokenizer.from_file(str(task.folder / "tokenizer.json"))
    is_end = lambda token: token == task.corpus.end_of_text  # noqa: E731
    parts = (list(part) for ended, part in itertools.groupby(tokens, is_end) if not ended)
    return [tokenizer.decode(part) for part in parts]


def test_all_text_comes_back_from_the_samples_and_no_document_is_in_both_splits(
    task: LanguageModelling, corpus: Path
) -> None:
    train, held_out = documents_of(task, "train"), documents_of(task, "held_out")
    assert sorted(train + held_out) == sorted(file.read_text() for file in corpus.iterdir())
    assert len(held_out) >= 2
    assert not set(train) & set(held_out)


def test_a_batch_is_inputs_and_unshifted_labels(task: LanguageModelling) -> None:
    batch = task.samples([3, 0], "train")
    assert batch["input_ids"].shape == (2, SEQUENCE_LENGTH)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert int(batch["input_ids"].max()) < task.corpus.vocabulary_size
    assert task.weight(batch) == 2 * (SEQUENCE_LENGTH - 1)


def test_the_summary_counts_what_is_there(task: LanguageModelling, corpus: Path) -> None:
    assert task.corpus.num_documents == 60
    assert task.corpus.num_bytes == sum(file.stat().st_size for file in corpus.iterdir())
    assert task.num_samples("train") == math.ceil(task.corpus.num_train_tokens / SEQUENCE_LENGTH)


def test_the_loss_of_an_untrained_model_is_uniform_and_perplexity_is_the_vocabulary(
    task: LanguageModelling,
) -> None:
    batch = task.samples([0, 1], "train")
    logits = torch.zeros(2, SEQUENCE_LENGTH, task.corpus.vocabulary_size)
    loss = task.loss(logits, batch).item()
    assert task.metrics(loss) == {"perplexity": pytest.approx(task.corpus.vocabulary_size, rel=1e-5)}
    assert task.metrics(1e9) == {"perplexity": math.inf}


def test_preparing_again_changes_nothing_and_other_text_goes_elsewhere(
    prepared: Path, corpus: Path, tmp_path: Path
) -> None:
    cache = prepared.parent
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    assert LanguageModelling.prepare(options(corpus, cache)) == prepared
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*")} == before
    copy = shutil.copytree(corpus, tmp_path / "copy")
    assert LanguageModelling.prepare(options(copy, cache)) == prepared  # where it lies does not matter
    (copy / "00.txt").write_text("changed")
    assert LanguageModelling.prepare(options(copy, tmp_path / "cache")).name != prepared.name


def test_tokens_are_the_same_wherever_they_are_prepared(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    other = LanguageModelling.prepare(options(corpus, tmp_path))
    assert other.name == prepared.name
    for file in prepared.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_preparation_is_never_taken_for_a_finished_one(
    prepared: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", killed)  # the summary is written after the tokens
        with pytest.raises(KeyboardInterrupt):
            LanguageModelling.prepare(options(corpus, tmp_path))
    assert [path.name for path in tmp_path.iterdir() if "tokens" in path.name] == []
    assert LanguageModelling.prepare(options(corpus, tmp_path)).name == prepared.name


def test_opening_writes_nothing_and_maps_the_tokens(prepared: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (prepared, *prepared.parent.rglob("*"))}
    task = LanguageModelling.open(prepared, sequence_length=SEQUENCE_LENGTH)
    task.samples([0], "train")
    assert {file: file.stat().st_mtime_ns for file in (prepared, *prepared.parent.rglob("*"))} == before
    stream = task.packed["train"].stream
    assert type(stream).__name__ == "memmap"
    assert not stream.flags.writeable


def test_it_pickles_as_the_path_of_its_folder(task: LanguageModelling) -> None:
    data = pickle.dumps(task)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert torch.equal(copy.samples([5], "train")["labels"], task.samples([5], "train")["labels"])


def test_a_resumed_run_reads_the_same_batches(prepared: Path) -> None:
    def batches(steps: range) -> list[torch.Tensor]:
        task = LanguageModelling.open(prepared, sequence_length=SEQUENCE_LENGTH)
        count = task.num_samples("train")
        numbers = [sample_indices(seed=5, step=s, global_batch=4, num_samples=count) for s in steps]
        return [task.samples(indices, "train")["input_ids"] for indices in numbers]

    whole, resumed = batches(range(8)), batches(range(3)) + batches(range(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not torch.equal(whole[0], whole[1])


def test_too_little_text_is_refused_when_it_is_prepared(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_length=100000"):
        LanguageModelling.prepare(options(corpus, tmp_path, sequence_length=100_000))


def test_a_folder_that_was_not_prepared_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prepare it first"):
        LanguageModelling.open(tmp_path, sequence_length=SEQUENCE_LENGTH)
    damaged = shutil.copytree(prepared, tmp_path / "damaged")
    (damaged / "train.npy").write_bytes((prepared / "train.npy").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="damaged"):
        LanguageModelling.open(damaged, sequence_length=SEQUENCE_LENGTH)


def test_a_loaded_tokenizer_gives_the_tokens_of_its_own_vocabulary(
    prepared: Path, corpus: Path, tmp_path: Path
) -> None:
    same = LanguageModelling.prepare(options(corpus, tmp_path, tokenizer=str(prepared), vocabulary_size=5000))
    assert (same / "train.npy").read_bytes() == (prepared / "train.npy").read_bytes()


def test_a_sample_that_is_not_there_is_refused(task: LanguageModelling) -> None:
    count = task.num_samples("held_out")
    for wrong in (-1, count):
        with pytest.raises(ConfigError, match=f"got {wrong};"):
            task.samples([wrong], "held_out")


def test_options_that_contradict_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_length=1"):
        options(corpus, tmp_path, sequence_length=1)
    with pytest.raises(ConfigError, match="end_of_text"):
        options(corpus, tmp_path, end_of_text="</s>")
