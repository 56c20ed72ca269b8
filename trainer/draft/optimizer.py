"""AdamW on fp32 masters, whose state is by name and resumes to the same bytes.

Source: Loshchilov and Hutter 2019, arXiv 1711.05101. Vectors are not decayed, as in the policy's.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from samebit.trainer.config import OptimizerConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """That of optimizer step `step`, from 0 on, of num_steps: a linear rise over the warm-up, whose
    first step is not 0, then the schedule, whose last step is min_lr."""
    warmup = config.lr_warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, num_steps - 1 - warmup))
    left = 1 - done if config.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (config.lr - config.min_lr) * left


class MasterAdamW:
    """AdamW over named fp32 tensors, which it rewrites in place. Its moments are there from the
    start: what is allocated later, as an engine's KV cache, finds the rest of the memory."""

    def __init__(self, masters: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self._masters = masters
        matrices = [m for m in masters.values() if m.dim() > 1]
        vectors = [m for m in masters.values() if m.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            foreach=False,
        )
        for master in masters.values():
            zeros = torch.tensor(0.0), torch.zeros_like(master), torch.zeros_like(master)
            self._adam.state[master] = dict(zip(_STATE, zeros, strict=True))

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], lr: float) -> None:
        """One step by fp32 gradients of every master."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for name, master in self._masters.items():
            master.grad = grads[name]
        self._adam.step()
        for master in self._masters.values():
            master.grad = None

    def reset(self) -> None:
        """Forget the moments: what is next is the first step."""
        for master in self._masters.values():
            for moment in self._adam.state[master].values():
                moment.zero_()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By name: the master and its moments."""
        return {
            name: {"master": master.detach(), **self._adam.state[master]}
            for name, master in self._masters.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state_dict of the same names and shapes; ValueError for another's. One
        without moments is of a draft before its first step."""
        shapes = {name: tuple(m.shape) for name, m in self._masters.items()}
        found = {name: tuple(s["master"].shape) for name, s in state.items()}
        if wrong := sorted(k for k in shapes.keys() | found if shapes.get(k) != found.get(k)):
            raise ValueError(
                f"the state is another draft's: {wrong[0]} is {found.get(wrong[0])} there, "
                f"{shapes.get(wrong[0])} here"
            )
        for name, master in self._masters.items():
            master.copy_(state[name]["master"])
            for key, moment in self._adam.state[master].items():
                if key in state[name]:
                    moment.copy_(state[name][key])
                else:
                    moment.zero_()
