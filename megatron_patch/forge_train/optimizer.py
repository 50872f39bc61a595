"""The ``torch.optim.Optimizer`` face of fused weights and the parameters beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch

from ._types import Storage
from .data_parallel import agree
from .engine import Engine, StepResult
from .ownership import release
from .rules import Rule, on_gpu, rule_flags
from .state import load_state, state_of
from .weights import Weight


def param_groups_of(
    model: torch.nn.Module, rule: Rule, groups: Iterable[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """Complete a user's param groups with the rule's options.

    Args:
        model: its trainable parameters make the one group where ``groups`` is None, in the order of
            ``model.parameters()``, as ``torch.optim`` would number them.
        rule: the options' first values.
        groups: as ``torch.optim`` takes them.

    Raises:
        ValueError: a group lacks ``params``, names an option that the rule has not, repeats a
            parameter or holds one that is not the model's.
    """
    own = dict.fromkeys(model.parameters())
    if groups is None:
        return [{**rule.options, "params": [p for p in own if p.requires_grad]}]
    completed, seen = [], set()
    for index, group in enumerate(groups):
        if "params" not in group:
            raise ValueError(f"groups[{index}] has no 'params'")
        unknown = set(group) - set(rule.options) - {"params", "initial_lr"}
        if unknown:
            raise ValueError(
                f"groups[{index}] has options {sorted(unknown)} that {type(rule).__name__} lacks"
                f"; it has {sorted(rule.options)}"
            )
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        for parameter in params:
            if parameter not in own:
                raise ValueError(f"groups[{index}] holds a tensor that is not in the model")
            if parameter in seen:
                raise ValueError(f"groups[{index}] repeats a parameter of an earlier group")
            seen.add(parameter)
        completed.append({**rule.options, **group, "params": params})
    return completed


class FusedOptimizer(torch.optim.Optimizer):
    """Steps fused weights and the rest; LR schedulers and checkpoints use it as any optimizer.

    ``param_groups`` carry torch.optim's names (``lr``, ``betas``, ``weight_decay``, …) and are read
    at every update. Fused weights have ``grad is None`` always: clip with ``max_norm``, for
    ``clip_grad_norm_`` cannot see them.

    Args:
        param_groups: complete groups, from :func:`param_groups_of`.
        rule: the rule of every weight.
        engine: holds the weights.
        parameters: the parameter of each weight of ``engine``, in the same order.
        max_norm: clip the global norm at each step.

    Attributes:
        last: what the last step did: norm, clip coefficient, skipped or not, non-finite layers.
            On a GPU the first look at it waits for that step; see :class:`StepResult`.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        rule: Rule,
        engine: Engine,
        parameters: Sequence[torch.nn.Parameter],
        *,
        max_norm: float | None = None,
    ) -> None:
        """Take the groups over; they are the very dicts that the weights read."""
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm={max_norm} must be positive, or None for no clipping")
        self._sealed = False
        super().__init__(param_groups, rule.options)
        self.engine, self.rule, self.max_norm = engine, rule, max_norm
        self.last: StepResult | None = None
        self._before_capture: StepResult | None = None
        self._weights: dict[torch.Tensor, Weight] = dict(
            zip(parameters, engine.weights, strict=True)
        )
        self._closed = False
        self._sealed = True

    # -- torch.optim's face -------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Finish the step: norm, clipping, and every update that the backward has not made.

        Raises:
            NotImplementedError: a closure was given.
            RuntimeError: see :meth:`Engine.finish_step`.
        """
        if closure is not None:
            raise NotImplementedError(
                "step(closure) evaluates the loss several times for one step, which rules with a "
                "single gradient do not need; call backward() and then step()"
            )
        self._refuse_closed()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Pinned memory that is let go of within a capture is lost to torch's allocator: it
            # would ask an event of the capture whether the copy is done.
            self._before_capture = self.last
        with torch.no_grad():
            self.last = self.engine.finish_step(max_norm=self.max_norm)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError(
                "fused.remove() was called; make a new optimizer for the plain model, and load "
                "this one's state_dict() into it"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the rest and factors that no step has used."""
        self.engine.discard()
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: a weight is fused when its model is.

        Raises:
            NotImplementedError: always, once the optimizer is made.
        """
        if self._sealed:
            raise NotImplementedError(
                "add_param_group: remove() and fuse() again with groups=[...], and carry "
                "state_dict() over"
            )
        params = param_group["params"]
        super().add_param_group(param_group)
        # The weights hold these dicts: torch must not have replaced them by copies.
        if self.param_groups[-1]["params"] is not params:
            self.param_groups[-1] = param_group

    # -- CUDA graphs --------------------------------------------------------------------------

    def before_replay(self) -> None:
        """Bring learning rates and other options to where a captured step reads them.

        :func:`forge_train.capture` calls it. The host does not wait.

        Raises:
            ValueError: an option is out of its range; nothing was written.
        """
        self._refuse_closed()
        with torch.no_grad():
            self.engine.scalars.write(self.engine.seed)

    def after_replay(self, captured: StepResult, steps: int = 1) -> None:
        """Note that a replay has made steps, and what the last of them did, as :attr:`last`.

        Args:
            captured: what :attr:`last` was at the end of the capture.
            steps: that one replay makes.
        """
        self.engine.replayed(steps)
        self.last = captured.of_replay()

    # -- reports ------------------------------------------------------------------------------

    @property
    def last_grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; None where none was taken."""
        return self.last.norm if self.last is not None else None

    @property
    def skipped_steps(self) -> int:
        """Steps skipped as a whole for inf or nan."""
        return self.engine.skipped_steps

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's weights.

        fp32 states have torch.optim's own names and shapes, so ``torch.optim``'s optimizer of the
        same rule loads this. Other formats are saved as stored: ``exp_avg`` (bf16 or uint8) with
        ``exp_avg_scale``; masters of bf16 weights as ``weight_extra``. The tensors are the live
        ones, not copies, as with torch.

        With ``data_parallel`` every rank calls this at the same time, and gets copies of the whole
        states of fused weights on the CPU: of each rank's own rows, put together.
        """
        numbers = self._numbers()
        state = {
            numbers[parameter]: state_of(weight)
            for parameter, weight in self._weights.items()
            if weight.step > 0 and parameter in numbers
        }
        groups = [
            {
                **{key: value for key, value in group.items() if key != "params"},
                "params": [numbers[parameter] for parameter in group["params"]],
            }
            for group in self.param_groups
        ]
        packed: dict[str, Any] = {
            "state": dict(sorted(state.items())),
            "param_groups": groups,
            # torch.optim ignores this key.
            "forge": {"seed": self.engine.seed, "skipped_steps": self.engine.skipped_steps},
        }
        for hook in self._optimizer_state_dict_post_hooks.values():
            packed = hook(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or torch's optimizer of the same rule saved.

        Load the model first: its ``load_state_dict`` sets masters to the weights it loads.
        Nothing changes if this raises. With ``data_parallel`` every rank calls this with the same
        state, of which it takes its own rows.

        Raises:
            ValueError: groups, options, shapes or formats do not fit, or it is no such state at
                all; the message names what.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        replicas = self.engine.replicas
        try:
            own, work = self._check_state(state_dict)
            saved_groups, saved = state_dict["param_groups"], state_dict["state"]
            facts: dict[str, object] = {"a problem": None}
            facts |= {f"step of {n}": _count(entry) for n, entry in saved.items()}
            facts["seed"] = own.get("seed", self.engine.seed)
        except Exception as error:
            # The other ranks must not wait for this one.
            if replicas is not None:
                agree(replicas.group, {"a problem": error}, "load_state_dict")
            raise
        if replicas is not None:
            agree(replicas.group, facts, "load_state_dict")
        for commit in work:
            commit()
        self.engine.seed = own.get("seed", self.engine.seed)
        self.engine.skipped_steps = own.get("skipped_steps", self.engine.skipped_steps)
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            # torch saves options of its own (foreach, fused, …) that mean nothing here.
            for key, value in saved_group.items():
                if key in self.rule.options or key == "initial_lr":
                    if key in group and on_gpu(group[key]):
                        # A captured graph reads this very tensor.
                        group[key].fill_(float(value))
                    else:
                        group[key] = value
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _check_state(
        self, state_dict: dict[str, Any]
    ) -> tuple[Mapping[str, Any], list[Callable[[], None]]]:
        """Check all of a state; returns FORGE's own part of it, and what writes it.

        Raises:
            ValueError: see :meth:`load_state_dict`.
        """
        own = _check_structure(state_dict)
        saved_groups, saved = state_dict["param_groups"], state_dict["state"]
        self._check_groups(saved_groups)
        work = []
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            for parameter, number in zip(group["params"], saved_group["params"], strict=True):
                weight = self._weights.get(parameter)
                if weight is not None:
                    work.append(load_state(weight, saved.get(number, {})))
        return own, work

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> None:
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"load_state_dict: the optimizer has param groups of {sizes} parameters, the state "
                f"has {saved_sizes}; fuse() with the same groups"
            )
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            options = {key: saved.get(key, group[key]) for key in self.rule.options}
            for key, default in self.rule.options.items():
                if not _same_kind(options[key], default):
                    raise ValueError(
                        f"load_state_dict: param group {index} was saved with "
                        f"{key}={options[key]!r}, which is not of the kind of {default!r}"
                    )
            name = self.rule.name
            # torch's groups say so of rules that have it; the others cannot follow.
            lost = saved.get("amsgrad") and "amsgrad" not in self.rule.options
            if lost or rule_flags(name, options) != rule_flags(name, group):
                raise ValueError(
                    f"load_state_dict: param group {index} was saved with other options than "
                    f"{type(self.rule).__name__} was fused with (amsgrad, maximize, nesterov, or "
                    "momentum on or off); fuse() with the saved ones"
                )
            self._check_options(index, group, options)

    def _check_options(self, index: int, group: dict[str, Any], options: dict[str, Any]) -> None:
        """Ask the library of the saved numbers what it would say of them at the next step."""
        weights = [self._weights[p] for p in group["params"] if p in self._weights]
        for weight in weights[:1]:
            try:
                weight.linear.scalars({**group, **options}, step=1, seed=0)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"load_state_dict: param group {index} has options that its rule does not "
                    f"take: {error}"
                ) from error

    def _numbers(self) -> dict[torch.Tensor, int]:
        """torch.optim's numbering: parameters in the order of the groups."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        return {parameter: number for number, parameter in enumerate(order)}

    def close(self) -> None:
        """Make further steps an error; the state can still be saved."""
        self._closed = True
        release(self._weights)

    def storage_of(self, parameter: torch.nn.Parameter) -> Storage:
        """The tensors that one parameter's updates read and write."""
        return self._weights[parameter].storage

    def __getstate__(self) -> NoReturn:
        """Refuse pickling: the weights belong to native objects.

        Raises:
            TypeError: always.
        """
        raise TypeError("FusedOptimizer cannot be pickled or copied; save its state_dict()")


def _count(entry: Any) -> float | None:
    """The steps in a parameter's saved entry, which was checked."""
    step = entry.get("step")
    return None if step is None else float(step)


def _same_kind(saved: Any, default: Any) -> bool:
    """Whether a saved option is what the rule's default is: a flag, a number or several."""
    if isinstance(default, bool):
        return isinstance(saved, bool)
    if isinstance(default, tuple):
        alike = isinstance(saved, (list, tuple)) and len(saved) == len(default)
        return alike and all(map(_same_kind, saved, default))
    if isinstance(default, (int, float)):
        # A learning rate may be a tensor.
        one = isinstance(saved, torch.Tensor) and saved.numel() == 1 and not saved.is_meta
        return one or isinstance(saved, (int, float))
    return True


def _check_structure(state_dict: Any) -> Mapping[str, Any]:
    """Check that it is the state of an optimizer; returns FORGE's own part of it.

    Raises:
        ValueError: it is something else, or a damaged one.
    """

    def require(fits: bool, what: str) -> None:
        if not fits:
            raise ValueError(f"load_state_dict: {what}; this is not an optimizer's state_dict()")

    require(isinstance(state_dict, Mapping), f"a {type(state_dict).__name__} was given")
    require(isinstance(state_dict.get("state"), Mapping), "'state' is no dict")
    groups = state_dict.get("param_groups")
    require(isinstance(groups, (list, tuple)), "'param_groups' is no list")
    for index, group in enumerate(groups):
        require(isinstance(group, Mapping), f"param group {index} is no dict")
        numbers = group.get("params")
        fits = isinstance(numbers, (list, tuple)) and all(isinstance(n, int) for n in numbers)
        require(fits, f"'params' of param group {index} is no list of numbers")
    own = state_dict.get("forge", {})
    require(isinstance(own, Mapping), "'forge' is no dict")
    for key in ("seed", "skipped_steps"):
        number = own.get(key, 0)
        fits = isinstance(number, int) and 0 <= number < 2**64
        require(fits, f"'{key}' is {number!r}")
    return own
