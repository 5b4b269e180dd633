"""Documents come in one order on every machine, binary files stay out, and the splits never share one."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.tasks.corpus import read_documents, split_documents


def write(folder: Path, **files: str | bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_a_folder_is_read_in_path_order(tmp_path: Path) -> None:
    write(tmp_path, b="2", a__z="1", B="0", c__d__e="3")
    assert read_documents(str(tmp_path)) == ("0", "1", "2", "3")


def test_a_file_and_a_glob_are_sources_too(tmp_path: Path) -> None:
    write(tmp_path, **{"one.txt": "one", "two.txt": "two", "sub__three.txt": "three", "four.md": "four"})
    assert read_documents(str(tmp_path / "four.md")) == ("four",)
    assert read_documents(str(tmp_path / "*.txt")) == ("one", "two")
    assert read_documents(str(tmp_path / "**" / "*.txt")) == ("one", "three", "two")


def test_sources_keep_their_order_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, a="a", b="b")
    assert read_documents([str(tmp_path / "b"), str(tmp_path)]) == ("b", "a")


def test_the_order_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    files = {"x.py": "1", "x__y": "2", "x-y": "3"}
    first = write(tmp_path / "here", **{"x__y": "2", "x-y": "3", "x.py": "1"})
    second = write(tmp_path / "over" / "there", **dict(reversed(files.items())))
    assert read_documents(str(first)) == read_documents(str(second)) == ("3", "1", "2")


def test_binary_empty_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        text="kept",
        image=b"\x89PNG\x00\x01",
        empty="",
        **{".git__config": "hidden", ".env": "hidden"},
    )
    assert read_documents(str(tmp_path)) == ("kept",)


def test_bytes_that_are_not_utf8_are_replaced_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, latin=b"caf\xe9", marked=b"\xef\xbb\xbfmarked")
    assert read_documents(str(tmp_path)) == ("caf\ufffd", "marked")


@pytest.mark.parametrize("source", ["nothing.txt", "*.nothing", "empty_folder"])
def test_a_source_without_files_is_an_error_that_names_it(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(ConfigError, match="at least one file") as caught:
        read_documents(str(tmp_path / source))
    assert source in str(caught.value)


def test_sources_without_text_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, image=b"\x00")
    with pytest.raises(ConfigError, match="1 files"):
        read_documents(str(tmp_path))
    with pytest.raises(ConfigError, match="at least one text document"):
        read_documents([])


def test_the_standard_library_is_at_least_five_megabytes_of_source() -> None:
    documents = read_documents("stdlib")
    assert sum(len(text.encode()) for text in documents) >= 5_000_000
    assert any("class ArgumentParser" in text for text in documents)
    assert not any("import pytest" in text for text in documents)


@settings(max_examples=60)
@given(
    documents=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True),
    fraction=st.floats(0, 0.5),
)
def test_a_split_is_disjoint_and_loses_no_text(documents: list[str], fraction: float) -> None:
    split = split_documents(documents, held_out_fraction=fraction)
    by_document = set(split.train) | set(split.held_out) == set(documents)
    if by_document:
        assert not set(split.train) & set(split.held_out)
        assert len(split.train) + len(split.held_out) == len(documents)
    else:  # every document was cut in two: they can be put together again
        assert sum(map(len, (*split.train, *split.held_out))) == sum(map(len, documents))
        for text in documents:
            ends = [text[len(start) :] for start in ("", *split.train) if text.startswith(start)]
            assert any(end == "" or end in split.held_out for end in ends)


def test_the_split_meets_its_fraction_over_many_documents() -> None:
    split = split_documents([f"document {i}" for i in range(5000)], held_out_fraction=0.1)
    assert len(split.held_out) == pytest.approx(500, abs=85)  # 4 standard deviations


def test_adding_documents_moves_no_other_one() -> None:
    documents = [f"document {i}" for i in range(400)]
    few = split_documents(documents[:200], held_out_fraction=0.2)
    many = split_documents(documents[::-1], held_out_fraction=0.2)
    assert few.held_out
    assert set(few.held_out) == set(many.held_out) & set(documents[:200])
    assert set(few.train) == set(many.train) & set(documents[:200])


def test_equal_documents_stay_together() -> None:
    documents = [f"document {i % 100}" for i in range(400)]
    split = split_documents(documents, held_out_fraction=0.2)
    assert len(split.held_out) > 40
    assert not set(split.train) & set(split.held_out)


def test_of_one_big_file_the_end_is_held_out_at_a_line_end() -> None:
    text = "".join(f"line {i:03}\n" for i in range(100))
    split = split_documents([text], held_out_fraction=0.095)
    assert split.train == (text[:810].removesuffix("line 090\n"),)
    assert "".join(split.train + split.held_out) == text


def test_nothing_is_held_out_at_fraction_zero_and_other_fractions_are_refused() -> None:
    assert split_documents(["a"], held_out_fraction=0).held_out == ()
    for fraction in (-0.1, 0.6, float("nan")):
        with pytest.raises(ConfigError, match="held_out_fraction"):
            split_documents(["a"], held_out_fraction=fraction)
