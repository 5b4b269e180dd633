"""Which torch functions draw random numbers, and with which arguments they do.

A table and one look-up. It knows nothing of keys, seeds or how a draw is replaced.

A call that is given a generator of its own (`generator=g`) is not counted: its stream was chosen by the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import init

__all__ = ["is_random"]

_Arguments = tuple[Any, ...]
_Keywords = Mapping[str, Any]
_Rule = Callable[[_Arguments, _Keywords], bool]


def is_random(func: Callable[..., Any], args: _Arguments, kwargs: _Keywords | None = None) -> bool:
    """Whether `func(*args, **kwargs)`, as a TorchFunctionMode sees it, draws random numbers.

    False for dropout in evaluation or with p = 0 and for attention with dropout_p = 0. A call of any other
    function costs one look-up in a dict.
    """
    rule = _RULES.get(func)
    if rule is None:
        return False
    return rule(args, kwargs or {})


def _value(args: _Arguments, kwargs: _Keywords, position: int, name: str, default: Any) -> Any:
    return args[position] if len(args) > position else kwargs.get(name, default)


def _always(args: _Arguments, kwargs: _Keywords) -> bool:
    return kwargs.get("generator") is None


def _dropout(args: _Arguments, kwargs: _Keywords) -> bool:
    # F.dropout(input, p, training, inplace); torch.dropout names its third argument `train`.
    train = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
    return bool(train) and bool(_value(args, kwargs, 1, "p", 0.5) > 0)


def _feature_dropout(args: _Arguments, kwargs: _Keywords) -> bool:
    # F.alpha_dropout and F.feature_alpha_dropout default to training=False.
    return bool(_value(args, kwargs, 2, "training", False)) and bool(_value(args, kwargs, 1, "p", 0.5) > 0)


def _attention(args: _Arguments, kwargs: _Keywords) -> bool:
    return bool(_value(args, kwargs, 4, "dropout_p", 0.0) > 0)


def _multi_head(args: _Arguments, kwargs: _Keywords) -> bool:
    # (query, key, value, embed_dim, num_heads, in_weight, in_bias, bias_k, bias_v, add_zero, dropout_p, ...,
    # training)
    training = _value(args, kwargs, 13, "training", True)
    return bool(training) and bool(_value(args, kwargs, 10, "dropout_p", 0.0) > 0)


def _rrelu(args: _Arguments, kwargs: _Keywords) -> bool:
    return bool(_value(args, kwargs, 3, "training", False)) and kwargs.get("generator") is None


def _recurrent(args: _Arguments, kwargs: _Keywords) -> bool:
    # (input, state, weights, has_biases, num_layers, dropout, train, ...); packed sequences have one argument
    # more in front of the weights.
    first = 5 if isinstance(args[3], bool) else 6
    return bool(args[first] > 0) and bool(args[first + 1])


def _fractional(args: _Arguments, kwargs: _Keywords) -> bool:
    return _value(args, kwargs, 5, "_random_samples", None) is None


_ALWAYS = {
    torch: "rand randn randint rand_like randn_like randint_like randperm bernoulli multinomial normal "
    "poisson binomial svd_lowrank pca_lowrank lobpcg _standard_gamma _sample_dirichlet",
    torch.Tensor: "bernoulli bernoulli_ uniform_ normal_ exponential_ random_ cauchy_ geometric_ log_normal_ "
    "multinomial",
    init: "uniform_ normal_ kaiming_uniform_",
    F: "gumbel_softmax",
}
_IF_TRAINING: Mapping[Any, tuple[str, _Rule]] = {
    torch: (
        "dropout dropout_ alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ "
        "feature_alpha_dropout feature_alpha_dropout_ native_dropout",
        _dropout,
    ),
    F: ("dropout dropout1d dropout2d dropout3d", _dropout),
}
_SPECIAL: Mapping[Any, _Rule] = {
    F.alpha_dropout: _feature_dropout,
    F.feature_alpha_dropout: _feature_dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    torch.rrelu_: _rrelu,
    torch.lstm: _recurrent,
    torch.gru: _recurrent,
    torch.rnn_tanh: _recurrent,
    torch.rnn_relu: _recurrent,
    F.fractional_max_pool2d: _fractional,
    F.fractional_max_pool2d_with_indices: _fractional,
    F.fractional_max_pool3d: _fractional,
    F.fractional_max_pool3d_with_indices: _fractional,
}


def _table() -> Mapping[Any, _Rule]:
    rules: dict[Any, _Rule] = {}
    for space, names in _ALWAYS.items():
        rules.update({getattr(space, name): _always for name in names.split()})
    for space, (names, rule) in _IF_TRAINING.items():
        rules.update({getattr(space, name): rule for name in names.split()})
    rules.update(_SPECIAL)
    return MappingProxyType(rules)


_RULES = _table()
