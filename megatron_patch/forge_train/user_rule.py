"""Rules that neither torch.optim nor FORGE has, in a few lines of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

import torch

from ._lib import check, ffi, lib, new_struct, rule_errors
from .rules import Rule

_F32_MAX = 3.4028234663852886e38
_CALLBACK = "int32_t(void *, const forge_rule_tile *)"
# Elements that a CPU function is tried on before it is accepted.
_TRIAL = 8

CpuFunction = Callable[..., None]


class _Defined:
    """A rule that the library knows; linears may refer to it until the process ends."""

    def __init__(
        self, key: tuple[Any, ...], names: tuple[str, ...], cpu: CpuFunction | None
    ) -> None:
        self.key, self.names, self.cpu = key, names, cpu
        self.n_states = len(key[1])
        # cffi frees a callback with its Python object.
        self.callback = ffi.callback(_CALLBACK, self._call) if cpu is not None else ffi.NULL

    def _call(self, _user: Any, tile: Any) -> int:
        """No exception may cross C: keep it for :func:`check`."""
        try:
            count = tile.count
            self.run(
                _tensor(tile.g, count),
                _tensor(tile.w, count),
                [_tensor(tile.states[k], count) for k in range(self.n_states)],
                {
                    name: torch.tensor(tile.hyper[i], dtype=torch.float32)
                    for i, name in enumerate(self.names)
                },
                tile.step,
            )
        except BaseException as error:  # KeyboardInterrupt, too, must not cross
            rule_errors.append(error)
            return 1
        return 0

    def run(
        self,
        g: torch.Tensor,
        w: torch.Tensor,
        states: list[torch.Tensor],
        hyper: Mapping[str, torch.Tensor],
        step: int,
    ) -> None:
        """Call the function; it must work in place."""
        assert self.cpu is not None
        with torch.no_grad():
            result = self.cpu(g, w, *states, step=step, **hyper)
        if result is not None:
            raise TypeError(
                f"it returned {type(result).__name__}; it must update w and its states in place "
                "(w.sub_(...), state.mul_(...)) and return nothing"
            )


_defined: dict[str, _Defined] = {}


def _tensor(pointer: Any, count: int) -> torch.Tensor:
    """A 1-D fp32 tensor over the library's memory, without a copy."""
    data = ffi.buffer(ffi.cast("char *", pointer), 4 * count)
    return torch.frombuffer(data, dtype=torch.float32)


def _code(function: CpuFunction | None) -> CodeType | CpuFunction | None:
    """What makes two functions the same: a cell of a notebook that is run again makes a new one."""
    return getattr(function, "__code__", function)


class UserRule(Rule):
    """An element-wise rule of one's own, in every format, schedule and shard of the built-in ones.

    Args:
        name: an identifier of C that no other rule has; checkpoints name the rule by it.
        states: names of its states, at most 3; they begin as zeros.
        non_negative: which of the states are never negative, such as averages of squares; with
            ``state_format="q8"`` these are stored as roots.
        cuda: statements of CUDA C over one element in fp32. By name there are ``g``, the gradient
            with clipping and loss scale in it; ``w`` and the states, to be updated; ``step``, from
            1, the hyper-parameters and the per-step values as constants. ``a * b + c`` is rounded
            twice, as written. ``root(x)`` and ``quotient(a, b)`` are ``sqrtf(x)`` and ``a / b``
            with fp32 factors, and else within 2 ulp and cheaper. None: for the CPU only.
        per_step: values for ``cuda`` that are computed once for each step in fp64: expressions of
            C over the hyper-parameters, ``step`` and the values before them.
        cpu: ``cpu(g, w, *states, step, lr, weight_decay, ...)``, the same for the CPU: 1-D fp32
            tensors, updated in place; hyper-parameters by keyword as fp32 scalars, so that
            ``1 - beta`` rounds as in CUDA (``float(beta)`` has the number); ``step`` an int. Called
            from several threads. None: the rule is for GPUs only.
        lr: learning rate.
        weight_decay: weight decay; what it means is the rule's business.
        maximize: ascend; ``g`` has the sign already.
        **hyper: further hyper-parameters, numbers; a param group may set them as any other.

    Raises:
        ForgeArgumentError: a name, a count or the text cannot be; the message says which and why.
        ValueError: another rule of this name exists, or ``cpu`` fails on a first trial.

    Example::

        rule = forge_train.UserRule(
            "soft_sign", states=["m"], beta=0.9,
            cuda="m = beta * m + (1.0f - beta) * g; w -= lr * (m / (fabsf(m) + 1e-6f));",
        )
    """

    def __init__(
        self,
        name: str,
        *,
        states: Iterable[str] = (),
        non_negative: Iterable[str] = (),
        cuda: str | None = None,
        per_step: Mapping[str, str] | None = None,
        cpu: CpuFunction | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        maximize: bool = False,
        **hyper: float,
    ) -> None:
        """Check the rule and make it known to the library."""
        self.name = name  # type: ignore[misc]
        self.states, self.non_negative = tuple(states), tuple(non_negative)
        self.cuda, self.per_step, self.cpu = cuda, dict(per_step or {}), cpu
        unknown = set(self.non_negative) - set(self.states)
        if unknown:
            raise ValueError(f"non_negative={sorted(unknown)} are not among states={self.states}")
        numbers = {"lr": lr, "weight_decay": weight_decay, **hyper}
        for option, value in numbers.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{option}={value!r} is not a number; hyper-parameters are")
        self._options: dict[str, Any] = {**numbers, "maximize": maximize}
        self._define(tuple(numbers))

    @property
    def options(self) -> dict[str, Any]:
        """Every option by name, as a param group of ``torch.optim`` holds them."""
        return dict(self._options)

    def with_options(self, **options: Any) -> UserRule:
        """This rule with other values of its options."""
        unknown = set(options) - set(self._options)
        if unknown:
            known = ", ".join(self._options)
            raise TypeError(
                f"{sorted(unknown)} are no options of rule {self.name!r}; it has {known}"
            )
        return UserRule(
            self.name,
            states=self.states,
            non_negative=self.non_negative,
            cuda=self.cuda,
            per_step=self.per_step,
            cpu=self.cpu,
            **{**self._options, **options},
        )

    def _key(self) -> tuple[Any, ...]:
        return (self.name, _defined[self.name].key, tuple(self._options.items()))

    def __eq__(self, other: object) -> bool:
        """The same rule with the same options."""
        return isinstance(other, UserRule) and self._key() == other._key()

    def __hash__(self) -> int:
        """As :meth:`__eq__`."""
        return hash(self._key())

    def __repr__(self) -> str:
        """Name and options."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"UserRule({self.name!r}, {options})"

    def _define(self, names: tuple[str, ...]) -> None:
        per_step = tuple(self.per_step.items())
        key = (names, self.states, self.non_negative, self.cuda, per_step, _code(self.cpu))
        known = _defined.get(self.name)
        if known is not None and known.key == key:
            return
        if known is not None:
            raise ValueError(
                f"name={self.name!r}: another rule of this name was defined in this process, and "
                "layers may use it; choose another name"
            )
        defined = _Defined(key, names, self.cpu)
        if self.cpu is not None:
            self._try(defined, names)
        self._register(defined, names)
        _defined[self.name] = defined

    def _try(self, defined: _Defined, names: tuple[str, ...]) -> None:
        """A mistake in the function is better found here than in the middle of a training step."""
        numbers = {
            name: torch.tensor(float(self._options[name]), dtype=torch.float32) for name in names
        }
        g, w = torch.ones(_TRIAL), torch.ones(_TRIAL)
        try:
            defined.run(g, w, [torch.zeros(_TRIAL) for _ in self.states], numbers, 1)
        except Exception as error:
            raise ValueError(
                f"rule {self.name!r}: cpu fails on a tile of {_TRIAL} elements with "
                f"{len(self.states)} states: {error}"
            ) from error
        if w.shape != (_TRIAL,) or torch.equal(w, torch.ones(_TRIAL)):
            raise ValueError(
                f"rule {self.name!r}: cpu left w as it was for a gradient of ones; update it in "
                "place, w.sub_(...)"
            )

    def _register(self, defined: _Defined, names: tuple[str, ...]) -> None:
        definition = new_struct("forge_rule_definition")
        kept: list[Any] = []

        def string(value: str) -> Any:
            kept.append(ffi.new("char[]", value.encode()))
            return kept[-1]

        for field, count, most in [
            ("n_states", len(self.states), 3),
            ("n_hyper", len(names), 16),
            ("n_per_step", len(self.per_step), 16),
        ]:
            # The library says what is wrong with a count; the arrays have room for so many.
            setattr(definition, field, count)
            if count > most:
                check(lib.forge_rule_register(definition), f"rule {self.name!r}")
        definition.name = string(self.name)
        for i, state in enumerate(self.states):
            definition.state_names[i] = string(state)
            definition.state_kinds[i] = (
                lib.FORGE_STATE_NON_NEGATIVE
                if state in self.non_negative
                else lib.FORGE_STATE_SIGNED
            )
        for i, name in enumerate(names):
            definition.hyper_names[i] = string(name)
            # Values come with each step, so they are no part of what the rule is.
            definition.hyper_least[i] = 0.0 if name in ("lr", "weight_decay") else -_F32_MAX
            definition.hyper_most[i] = _F32_MAX
        for i, (name, expression) in enumerate(self.per_step.items()):
            definition.per_step_names[i] = string(name)
            definition.per_step_expressions[i] = string(expression)
        if self.cuda is not None:
            definition.cuda_source = string(self.cuda)
        definition.cpu_function = defined.callback
        check(lib.forge_rule_register(definition), f"rule {self.name!r}")
