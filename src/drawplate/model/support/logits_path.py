"""Before any weight is read: is what lies between the body and the logits what the loss reckons with?

The loss goes from the body's last hidden state straight to the frozen head, whose logits may be scaled and soft-capped
(`model/ends/head.py`). An architecture that does more there, a layer before its head or a factor of another name, would
be trained with another loss than its own. So transformers' own forward is called once with two stand-ins: a body that
gives known hidden states, and a linear head that costs nothing. What comes out is compared with the loss's own formula.
Nothing else of the model is computed, whatever its size.

Left out: architectures whose forward does not call its body as one module (OPT, BART). Of those nothing is found out
here; the self-check after loading still compares their loss with transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from drawplate.errors import UsageError
from drawplate.model.layer.anatomy import Anatomy

POSITIONS = 2
LARGEST_LOGIT = 100.0
"""Beyond where any soft-cap in use begins to bend (15 to 50)."""


class _BodyOutput(BaseModelOutputWithPast):
    """What else an architecture's body may hand over, such as router logits, is None."""

    def __getattr__(self, name: str) -> None:
        return None


@torch.no_grad()
def require_known_logits(anatomy: Anatomy) -> None:
    """Refuse an architecture whose logits are not those of `anatomy`: the body's output, head, scale, soft-cap.

    Raises:
        UsageError: it does something else; the model type is named, with what differs.
    """
    head = cast(nn.Linear, anatomy.skeleton.get_submodule(anatomy.head_path))
    hidden_1TH = torch.linspace(-1, 1, POSITIONS * anatomy.config.hidden_size).view(1, POSITIONS, -1)
    columns_V = torch.arange(head.out_features) % hidden_1TH.shape[-1]
    bias_V = torch.linspace(-1, 1, head.out_features) if head.bias is not None else 0.0
    reached: list[str] = []

    def body_of(*_: Any, **__: Any) -> _BodyOutput:
        reached.append("body")
        return _BodyOutput(last_hidden_state=hidden_1TH)

    def head_of(x_1TH: Tensor) -> Tensor:
        reached.append("head")
        return LARGEST_LOGIT * x_1TH[..., columns_V] + bias_V

    with _standing_in(anatomy.body, body_of), _standing_in(head, head_of):
        want_1TV = head_of(hidden_1TH) * anatomy.logit_scale
        reached.clear()
        try:
            ids = torch.zeros(1, POSITIONS, dtype=torch.long)
            logits_1TV = anatomy.skeleton(input_ids=ids, use_cache=False, return_dict=True).logits
        except Exception as error:  # whatever an architecture's own code may raise
            if reached == ["body"] and "meta" in str(error):
                raise _refused(anatomy, "a layer with weights lies between its body and its head") from None
            return
    if anatomy.softcap is not None:
        want_1TV = anatomy.softcap * torch.tanh(want_1TV / anatomy.softcap)
    if reached == ["body", "head"] and not torch.allclose(logits_1TV.float(), want_1TV, rtol=1e-4, atol=1e-4):
        raise _refused(anatomy, "something between its body and its logits is not known here")


def _refused(anatomy: Anatomy, why: str) -> UsageError:
    return UsageError(
        f"{anatomy.architecture} (model type {anatomy.config.model_type}) would be trained with another loss than its "
        f"own: {why}.",
        safe="Nothing was loaded or written.",
        next_step="Choose a model such as Llama, Mistral, Qwen, Gemma, Phi, SmolLM or OLMo.",
    )


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
