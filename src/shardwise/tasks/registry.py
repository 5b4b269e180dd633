"""Tasks by name, from the options of a run file. Adding a kind of task is adding a file and a line in KINDS.

It knows names and options; it refuses to know what a task does. Preparing and opening are two calls because a
corpus is prepared by one process and opened by every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from shardwise.errors import ConfigError
from shardwise.tasks.by_name import found
from shardwise.tasks.detection import FAMILY as DETECTS
from shardwise.tasks.detection import Detection, DetectionOptions, PreparedDetection
from shardwise.tasks.faults import fault_text, unknown_text
from shardwise.tasks.head import ModelHead
from shardwise.tasks.images import FAMILY as TELLS_IMAGES
from shardwise.tasks.images import Augment, ImageClassification, ImageOptions
from shardwise.tasks.imitation import Imitation, ImitationOptions, PreparedImitation
from shardwise.tasks.language_modelling import CorpusOptions, LanguageModelling
from shardwise.tasks.synthetic import RandomTokens
from shardwise.tasks.task import Task
from shardwise.tasks.token_classification import FAMILY as TAGS_WORDS
from shardwise.tasks.token_classification import TaggedOptions, TokenClassification
from shardwise.tasks.translation import FAMILY as TRANSLATES
from shardwise.tasks.translation import PreparedTranslation, Translation, TranslationOptions

__all__ = ["KINDS", "TaskKind", "head_of_kind", "may_have_head", "prepare_task", "task_from", "wanted_of_run"]

Options = Mapping[str, object]


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Dataclass)


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """How a kind of task is made: `prepare` is slow and gives the options (JSON values) that `open` takes."""

    prepare: Callable[[Options], dict[str, object]]
    open: Callable[[Options], Task]
    family: str | None = None  # see `ModelHead`; None: the task has no head of its own
    wants: frozenset[str] = frozenset()  # what the run knows: "cache", a folder, "tokenizer", where its model is


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """What a rank needs to open a prepared corpus."""

    folder: str
    sequence_length: int  # tokens


@dataclass(frozen=True, kw_only=True)
class PreparedTags:
    """What a rank needs to open prepared sentences with tags."""

    folder: str
    pad_to: int
    alike: int


@dataclass(frozen=True, kw_only=True)
class PreparedImages:
    """What a rank needs to open prepared images."""

    folder: str
    flip: bool
    shift: int


def prepare_task(kind: str, options: Options) -> dict[str, object]:
    """Do the slow part of a task once, in one process; returns the options that `task_from` takes in every
    rank.

    The result holds JSON values only, to be sent or stored. Raises ConfigError for an unknown kind or option.
    """
    return _kind(kind).prepare(options)


def task_from(kind: str, options: Options) -> Task:
    """The task of a kind: one of KINDS, or "package.module:factory", called with the options as keywords.

    Cheap and read-only. Options are those that `prepare_task` returned; kinds without a slow part take the
    run file's own too. Raises ConfigError for an unknown kind or option, and for a corpus that is not
    prepared.
    """
    return _kind(kind).open(options)


def head_of_kind(kind: str) -> ModelHead | None:
    """The head of a kind of task, as far as it is known without its data. Raises ConfigError for an unknown kind."""
    family = _kind(kind).family
    return ModelHead(family=family) if family is not None else None


def may_have_head(kind: str) -> bool:
    """Whether a task of this kind may be `Headed`: what a factory makes is known when it has been called."""
    return kind not in KINDS or KINDS[kind].family is not None


def wanted_of_run(kind: str) -> frozenset[str]:
    """Options that the run fills in where nobody says them: "cache", "tokenizer". None for an unknown kind."""
    return KINDS[kind].wants if kind in KINDS else frozenset()


def _kind(kind: str) -> TaskKind:
    if kind in KINDS:
        return KINDS[kind]
    if ":" in kind:
        return TaskKind(prepare=dict, open=lambda options: _from_factory(kind, options))
    close = difflib.get_close_matches(kind, KINDS, n=1)
    repair = f'write task.kind = "{close[0]}"' if close else "correct task.kind"
    raise ConfigError(f"a task is one of {', '.join(KINDS)} or package.module:factory, but got {kind!r}; {repair}")


def _prepare_corpus(options: Options) -> dict[str, object]:
    wanted = _checked(CorpusOptions, options)
    folder = LanguageModelling.prepare(wanted)
    return asdict(PreparedCorpus(folder=str(folder), sequence_length=wanted.sequence_length))


def _open_corpus(options: Options) -> Task:
    if "folder" not in options:
        raise ConfigError(
            f"a corpus is opened from the options that prepare_task returned; got {sorted(options)}; "
            "call prepare_task in one process first"
        )
    prepared = _checked(PreparedCorpus, options)
    return LanguageModelling.open(Path(prepared.folder), sequence_length=prepared.sequence_length)


def _prepare_tags(options: Options) -> dict[str, object]:
    wanted = _checked(TaggedOptions, options)
    folder = TokenClassification.prepare(wanted)
    return asdict(PreparedTags(folder=str(folder), pad_to=wanted.pad_to, alike=wanted.alike))


def _open_tags(options: Options) -> Task:
    prepared = _checked(PreparedTags, options)
    return TokenClassification.open(Path(prepared.folder), pad_to=prepared.pad_to, alike=prepared.alike)


def _prepare_pairs(options: Options) -> dict[str, object]:
    return asdict(Translation.prepare(_checked(TranslationOptions, options)))


def _open_pairs(options: Options) -> Task:
    return Translation.open(_checked(PreparedTranslation, options))


def _prepare_images(options: Options) -> dict[str, object]:
    wanted = _checked(ImageOptions, options)
    Augment(flip=wanted.flip, shift=wanted.shift)  # refused before anything is read
    folder = ImageClassification.prepare(wanted)
    return asdict(PreparedImages(folder=str(folder), flip=wanted.flip, shift=wanted.shift))


def _open_images(options: Options) -> Task:
    prepared = _checked(PreparedImages, options)
    augment = Augment(flip=prepared.flip, shift=prepared.shift)
    return ImageClassification.open(Path(prepared.folder), augment=augment)


def _prepare_boxes(options: Options) -> dict[str, object]:
    return asdict(Detection.prepare(_checked(DetectionOptions, options)))


def _open_boxes(options: Options) -> Task:
    return Detection.open(_checked(PreparedDetection, options))


def _prepare_imitation(options: Options) -> dict[str, object]:
    return asdict(Imitation.prepare(_checked(ImitationOptions, options)))


def _open_imitation(options: Options) -> Task:
    return Imitation.open(_checked(PreparedImitation, options))


def _prepare_random_tokens(options: Options) -> dict[str, object]:
    return asdict(_checked(RandomTokens, options))  # nothing to prepare, but wrong options are refused here


def _open_random_tokens(options: Options) -> Task:
    return _checked(RandomTokens, options)


def _from_factory(kind: str, options: Options) -> Task:
    task: Task = found(kind, "a task")(**options)
    return task


def _checked(cls: type[T], options: Options) -> T:
    """An instance of a dataclass from a mapping, with names and types checked."""
    known = [field.name for field in fields(cls)]
    needed = [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]
    faults = [unknown_text(f"task.{name}", name, known) for name in options if name not in known]
    faults += [f"task.{name} is missing; add it" for name in needed if name not in options]
    if faults:
        raise ConfigError("; ".join(faults))
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        raise ConfigError("; ".join(_fault(dict(fault)) for fault in error.errors())) from error


def _fault(fault: Mapping[str, Any]) -> str:
    """Of a union (one source, or several) only the first place is told: the others say it again."""
    return fault_text(f"task.{fault['loc'][0]}" if fault["loc"] else "task", fault)


KINDS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "language_modelling": TaskKind(prepare=_prepare_corpus, open=_open_corpus, wants=frozenset({"cache"})),
        "imitation": TaskKind(prepare=_prepare_imitation, open=_open_imitation, family="", wants=frozenset({"cache"})),
        "random_tokens": TaskKind(prepare=_prepare_random_tokens, open=_open_random_tokens),
        "images": TaskKind(prepare=_prepare_images, open=_open_images, family=TELLS_IMAGES, wants=frozenset({"cache"})),
        "detection": TaskKind(prepare=_prepare_boxes, open=_open_boxes, family=DETECTS, wants=frozenset({"cache"})),
        "token_classification": TaskKind(
            prepare=_prepare_tags,
            open=_open_tags,
            family=TAGS_WORDS,
            wants=frozenset({"cache", "tokenizer"}),
        ),
        "translation": TaskKind(
            prepare=_prepare_pairs,
            open=_open_pairs,
            family=TRANSLATES,
            wants=frozenset({"cache", "tokenizer"}),
        ),
    }
)
