"""SoftCFG (arXiv 2510.00996): guidance whose unconditional branch reads the values of sure tokens a little smaller.

Both branches see the same tokens, so the more of them there are, the less the branches differ and the less guidance
does. Here the unconditional branch is given less of what the conditional one was sure of.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nextscale.context import Attend, Context, Hook
from nextscale.errors import InputError
from nextscale.heads.bitwise import BitwiseHead
from nextscale.heads.categorical import CategoricalHead
from nextscale.heads.stable_sampling import StableSamplingHead
from nextscale.layers.memory import Tags
from nextscale.plan import Plan, places
from nextscale.run import At, Call, Rows, Run

CONFIDENCE, PLACES = "softcfg.confidence", "softcfg.places"


@dataclass(frozen=True)
class SoftCFG(Hook):
    """Guidance that does not fade as the context grows: values of confident tokens shrink without the class.

    p_i = max_v softmax(z_cond,i)(v) is how sure the conditional branch was of token i, before guidance and filters; of
    a token of bits, the product of theirs. At every step the branches without the class read w_i v_i instead of v_i in
    all layers and heads, for the tokens i of earlier steps, with

        w_i = 1 - budget p_i / sum_j p_j            (normalised; one token's worth is taken away in all)
        w_i = 1 - budget p_i                        (not normalised)

    and the guided output is z_cond + t (z_cond - z~_uncond). Memory keeps the values as they are: w changes every step.
    The paper's models draw token by token. Here a row counts for the token that it predicts; the first step's rows,
    which carry the condition, and the rows of the step itself are read as they are, and so are tokens that were given
    and never predicted. Of a scale that is drawn in rounds, p is the last round's.

    budget: 0 is plain guidance, 1 the paper's; 0 to 1. reads: ``values`` (the paper's choice), ``keys`` or ``both``,
    its ablation. Raises InputError where there is nothing to act on.
    """

    budget: float = 1.0
    normalised: bool = True
    reads: Literal["values", "keys", "both"] = "values"

    def __post_init__(self) -> None:
        if not 0 <= self.budget <= 1:
            raise InputError(f"softcfg: budget is {self.budget}; it must lie in 0..1 (1 is the paper's)")
        if self.reads not in ("values", "keys", "both"):
            raise InputError(f"softcfg: reads is {self.reads!r}; use values, keys or both")

    def prepare(self, model: Any, plan: Plan, hooks: Sequence[Hook]) -> None:
        head = getattr(model.head, "head", model.head)  # of one that draws through another
        if not isinstance(head, (CategoricalHead, BitwiseHead, StableSamplingHead)):
            raise InputError(f"softcfg: the confidence of a token needs logits, which a {type(head).__name__} does "
                             "not give; leave it out")
        if plan.visible.previous == 0:
            raise InputError("softcfg: the rows of this model see their own step alone, so there are no earlier values "
                             "to shrink; leave it out")
        if sum(isinstance(hook, SoftCFG) for hook in hooks) > 1:
            raise InputError("softcfg: it was given twice; once is enough")

    def inputs(self, run: Run, call: Call) -> Call:
        classless = [name.partition("/")[0] == "unconditional" for name in run.branches]
        if "conditional" not in run.branches or not any(classless):
            raise InputError("softcfg: it changes the unconditional branch of a guided run; set guidance_scale to "
                             "something else than 1")
        # Rows are found by their tags, which stay with them where a hook drops or selects some.
        place, order = _place(places(run.plan, run.device)[1], run.order).sort(1)
        run.memory.constant(PLACES, lambda: place if len(place) == 1 else place.repeat(len(classless), 1))
        confidence = self._confidence(run).gather(1, order.expand(run.pictures, -1))
        run.memory.state[CONFIDENCE] = torch.cat([confidence if acts else torch.zeros_like(confidence)
                                                  for acts in classless])
        return call

    def output(self, outputs: dict[str, Tensor], at: At, run: Run | None) -> dict[str, Tensor]:
        if run is not None:
            z = outputs["conditional"].float()  # (B, L, V), or two a bit, (B, L, d, 2)
            log_p = (z.amax(-1) - z.logsumexp(-1)).flatten(2).sum(-1) if z.ndim == 4 else z.amax(-1) - z.logsumexp(-1)
            found = self._confidence(run).clone()
            found[:, run.plan.span(at.step, at.step + 1)] = log_p.exp()
            run.carried[CONFIDENCE] = found
        return outputs

    def attend(self, ctx: Context, address: str, q: Tensor, k: Tensor | None, v: Tensor | None, rows: Rows,
               inner: Attend) -> Tensor:
        ctx.remembered("softcfg")
        if k is None or v is None or (rows.spans is not None and len(rows.spans) == 1):
            return inner(q, k, v, rows)
        return torch.cat([inner(q[:, :, at], k[:, :, at], v[:, :, at], part) for at, part in rows.by_step()], 2)

    def read(self, ctx: Context, address: str, k: Tensor, v: Tensor, keys: Tags,
             rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.spans is not None
        step = rows.spans[0].step
        # Before step 2 there is nothing but the condition; a control tower's values are not of the picture's tokens.
        if step < 2 or self.budget == 0 or address.startswith("control."):
            return k, v

        def make() -> Tensor:
            found = self.weights(ctx, keys, rows)
            return (found if found.ndim == 3 else found[:, None])[..., None]

        shared: Tensor = ctx.shared((CONFIDENCE, step), (keys.step, keys.cell, keys.valid), make)
        weight_RHN1 = shared[:len(v)]  # an address may hold the leading branches alone
        if self.reads != "values":
            k = (k * weight_RHN1).to(k.dtype)
        return k, v if self.reads == "keys" else (v * weight_RHN1).to(v.dtype)

    def weights(self, ctx: Context, keys: Tags, rows: Rows) -> Tensor:
        """What the values of remembered rows are multiplied with for the rows of one step, (R, N) float32, or
        (R, H, N) where heads hold other rows."""
        assert rows.spans is not None
        memory, step = ctx.remembered("softcfg"), rows.spans[0].step
        confidence_RL, places = memory.state[CONFIDENCE], memory.constants[PLACES]
        r, shape = len(confidence_RL), keys.step.shape[1:]
        asked = _place(keys.step, keys.cell).flatten(1).expand(r, -1).contiguous()
        places = places.expand(r, -1).contiguous()
        index = torch.searchsorted(places, asked).clamp_max(places.shape[1] - 1)
        counts = (places.gather(1, index) == asked).view(r, *shape) & (keys.step > 0) & (keys.step < step)
        counts = counts & rows.visible.sees(torch.full_like(keys.step, step), keys.step)
        if keys.valid is not None:
            counts = counts & keys.valid
        sure = confidence_RL.gather(1, index).view(r, *shape) * counts
        if self.normalised:
            sure = sure / sure.sum(-1, keepdim=True).clamp_min(torch.finfo(sure.dtype).tiny)
        return 1 - self.budget * sure

    @staticmethod
    def _confidence(run: Run) -> Tensor:
        """p of every token of the plan that was predicted, else 0, (B, L)."""
        if CONFIDENCE not in run.carried:
            run.carry(CONFIDENCE, torch.zeros(run.pictures, run.plan.length, device=run.device))
        return run.carried[CONFIDENCE]


def _place(step: Tensor, cell: Tensor) -> Tensor:
    """One number for a row's step and cell."""
    cell = cell.long()
    return (step.long() << 40) + (cell[..., 0] << 32) + (cell[..., 1] << 16) + cell[..., 2]
