"""Attention against its explicit-mask twin, against document-by-document, and inside transformers' own models."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from drawplate.errors import UsageError
from drawplate.model.layer import causal_attention
from drawplate.model.layer.anatomy import build_anatomy
from drawplate.model.layer.attention import drawplate_attention, refuse_left_padding, register

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BORDERS = (0, 5, 6, 29, 40)
RULES = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window": {"sliding_window": 7},
    "window of one": {"sliding_window": 1},
    "window wider than all": {"sliding_window": 99},
    "softcap": {"softcap": 1.5},
    "softcap and window": {"softcap": 1.5, "sliding_window": 7},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_attention, "BLOCK_QUERIES", 8)


def tensors(
    rows: int, heads: tuple[int, int], lengths: tuple[int, int], size: int, dtype=torch.float64, device="cpu"
) -> list[Tensor]:
    """[query_BHTD, key_BKSD, value_BKSD] laid out as projections leave them: (B, T, H, D) transposed."""
    generator = torch.Generator().manual_seed(sum(lengths) + size)
    shapes = [(rows, lengths[0], heads[0], size)] + 2 * [(rows, lengths[1], heads[1], size)]
    values = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(device, dtype).transpose(1, 2).requires_grad_() for x in values]


def attend(inputs: list[Tensor], **kwargs) -> Tensor:
    return drawplate_attention(nn.Module(), *inputs, None, **kwargs)[0]


def packing(borders: tuple[int, ...], device: str = "cpu", *, segments: bool = True) -> dict:
    cu = torch.tensor(borders, dtype=torch.int32, device=device)
    longest = max(stop - start for start, stop in pairwise(borders))
    kwargs = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    return kwargs | ({"segments": borders} if segments else {})


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)).sum(), inputs))


def assert_same(inputs: list[Tensor], ours: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Values and gradients, relative to the size of what is expected."""
    pairs = [(ours, expected), *zip(gradients(ours, inputs), gradients(expected, inputs), strict=True)]
    for value, wanted in pairs:
        assert (value.double() - wanted.double()).norm() <= tolerance * (wanted.double().norm() + 1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("size", [8, 7])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_explicit_mask(rule, heads, size, packed):
    inputs = tensors(1 if packed else 3, heads, (40, 40), size)
    kwargs = RULES[rule] | (packing(BORDERS) if packed else {})
    assert_same(inputs, attend(inputs, **kwargs), attend(inputs, impl="reference", **kwargs))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", ["fast", "reference"])
@pytest.mark.parametrize("segments", [True, False])
def test_packed_equals_document_by_document(rule, impl, segments):
    inputs = tensors(1, (4, 2), (40, 40), 6)
    kwargs = RULES[rule]
    packed = attend(inputs, impl=impl, **kwargs, **packing(BORDERS, segments=segments))
    alone = [attend([x[:, :, a:b] for x in inputs], impl=impl, **kwargs) for a, b in pairwise(BORDERS)]
    assert_same(inputs, packed, torch.cat(alone, dim=1))


def test_the_twin_equals_attention_written_as_a_loop():
    """The specification itself, one query at a time."""
    inputs = tensors(2, (4, 2), (9, 9), 5)
    query_BHTD, key_BKSD, value_BKSD = inputs
    expected_BTHD = torch.empty(2, 9, 4, 5, dtype=torch.float64)
    for row in range(2):
        for head in range(4):
            for t in range(9):
                seen = slice(max(0, t - 2), t + 1)  # a window of 3
                keys, values = key_BKSD[row, head // 2, seen], value_BKSD[row, head // 2, seen]
                scores = 2.0 * torch.tanh(0.3 * (keys @ query_BHTD[row, head, t]) / 2.0)
                expected_BTHD[row, t, head] = torch.softmax(scores, 0) @ values
    ours = attend(inputs, impl="reference", sliding_window=3, softcap=2.0, scaling=0.3)
    assert torch.allclose(ours, expected_BTHD)


def test_documents_do_not_see_each_other_and_would_without_borders():
    inputs = tensors(1, (2, 2), (40, 40), 4)
    changed = [x.detach().clone() for x in inputs]
    changed[1][:, :, 1] += 3.0  # a key of the first document
    for kwargs, same in ((packing(BORDERS), True), ({}, False)):
        before, after = attend(inputs, **kwargs), attend(changed, **kwargs)
        assert torch.equal(before[:, 5:], after[:, 5:]) == same
        assert not torch.allclose(before[:, 1:5], after[:, 1:5])


def test_right_padding_reaches_no_token():
    inputs = tensors(2, (2, 1), (12, 12), 4)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[1, :, 9:] = 1e3
    for kwargs in ({}, {"sliding_window": 4}, {"softcap": 2.0}):
        assert torch.equal(attend(inputs, **kwargs)[1, :9], attend(changed, **kwargs)[1, :9])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("new", [1, 3, 11])
def test_new_tokens_on_a_cache_equal_the_whole(rule, new):
    inputs = tensors(2, (4, 2), (30, 30), 6)
    whole = attend(inputs, **RULES[rule])
    query_BHTD, key_BKSD, value_BKSD = inputs
    for impl in ("fast", "reference"):
        last = attend([query_BHTD[:, :, -new:], key_BKSD, value_BKSD], impl=impl, **RULES[rule])
        assert torch.allclose(last, whole[:, -new:], rtol=1e-9)


def test_values_may_have_another_head_size():
    query, key, _ = tensors(1, (4, 2), (20, 20), 6)
    value = tensors(1, (4, 2), (20, 20), 10)[2]
    for kwargs in ({}, {"sliding_window": 5}, packing((0, 9, 20))):
        assert_same(
            [query, key, value],
            attend([query, key, value], **kwargs),
            attend([query, key, value], impl="reference", **kwargs),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_errs_no_more_than_the_twin_in_the_same_dtype(dtype, rule, packed, device, heads):
    inputs = tensors(1 if packed else 2, heads, (40, 40), 16, dtype, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    kwargs = RULES[rule] | (packing(BORDERS, device) if packed else {})
    truth = attend(exact, impl="reference", **kwargs)
    ours, twin = attend(inputs, **kwargs), attend(inputs, impl="reference", **kwargs)
    assert ours.dtype == dtype
    floor = 1e-5 if dtype == torch.float32 else 1e-3  # where the truth is 0; other norms are about 40
    triples = [(ours, twin, truth)]
    triples += zip(gradients(ours, inputs), gradients(twin, inputs), gradients(truth, exact), strict=True)
    for value, reference, expected in triples:
        error, allowed = (value.double() - expected).norm(), (reference.double() - expected).norm()
        assert error <= 1.5 * allowed + 2e-6 * expected.norm() + floor


def test_masks_made_in_inference_mode_do_not_stay():
    inputs = tensors(1, (2, 2), (20, 20), 4)
    with torch.inference_mode():
        attend(inputs, sliding_window=5)
    gradients(attend(inputs, sliding_window=5), inputs)


def test_softcapped_scores_are_not_kept_for_backward():
    inputs = tensors(1, (2, 2), (64, 64), 4)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attend(inputs, softcap=2.0)
    assert max(saved, default=0) < 2 * 64 * 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"position_bias": torch.zeros(2)}, "position bias"),
        ({"is_causal": False}, "bidirectional"),
        ({"output_attentions": True}, "attention weights"),
        ({"cache": object()}, "paged"),
    ],
)
def test_what_would_change_the_result_is_refused(change, words):
    with pytest.raises(UsageError, match=words):
        attend(tensors(1, (2, 2), (4, 4), 4), **change)


def test_modules_that_ask_for_more_are_refused():
    inputs = tensors(1, (2, 2), (4, 4), 4)
    module = nn.Module()
    module.layer_idx = 0
    module.config = SimpleNamespace(layer_types=["chunked_attention"])
    with pytest.raises(UsageError, match="chunked"):
        drawplate_attention(module, *inputs, None)
    module.config = SimpleNamespace(layer_types=["sliding_attention"], sliding_window=3)
    with pytest.raises(UsageError, match="sliding window"):
        drawplate_attention(module, *inputs, None)
    drawplate_attention(module, *inputs, None, sliding_window=3)
    module.is_causal = False
    with pytest.raises(UsageError, match="bidirectional"):
        drawplate_attention(module, *inputs, None, sliding_window=3)
    with pytest.raises(UsageError, match="mask"):
        drawplate_attention(nn.Module(), *inputs, torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("borders", [(0, 3), (1, 4), (0, 3, 2, 4), (0, 9)])
def test_borders_that_do_not_fit_are_refused(borders):
    with pytest.raises(ValueError, match="borders"):
        attend(tensors(1, (2, 2), (4, 4), 4), segments=borders)


def test_packing_of_several_rows_or_on_a_cache_is_refused():
    with pytest.raises(ValueError, match="one row"):
        attend(tensors(2, (2, 2), (4, 4), 4), segments=(0, 4))
    with pytest.raises(ValueError, match="one row"):
        attend(tensors(1, (2, 2), (2, 4), 4), segments=(0, 4))


def test_left_padding_is_refused_by_whoever_holds_the_mask():
    refuse_left_padding(torch.tensor([[1, 1, 1], [1, 0, 0]]))
    with pytest.raises(ValueError, match="padding"):
        refuse_left_padding(torch.tensor([[1, 1, 1], [0, 0, 1]]))


# transformers' own models -------------------------------------------------------------------------------------------


def tiny_config(name: str):
    import transformers

    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    more = {
        "Llama": {},
        "Mistral": {"sliding_window": 6},
        "Qwen3": {"head_dim": 8},
        "Gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "Gemma3Text": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    }[name]
    return getattr(transformers, f"{name}Config")(**sizes, **more, initializer_range=0.3)


def tiny_model(name: str, implementation: str):
    from transformers import AutoModelForCausalLM

    register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    return model.double().eval()


MODELS = ["Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3Text"]
DOCUMENTS = [torch.arange(n) * 7 % 96 for n in (5, 1, 23, 11)]


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # eager attention takes its softmax in float32 even here


def nats(model, ids_BT: Tensor, **kwargs) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False, **kwargs).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_loss_of_their_own_eager_attention(name):
    ours, theirs = tiny_model(name, "drawplate"), tiny_model(name, "eager")
    twin = tiny_model(name, "drawplate_reference")
    for document in DOCUMENTS[2:]:
        expected = nats(theirs, document[None])
        assert torch.allclose(nats(ours, document[None]), expected, **CLOSE)
        assert torch.allclose(nats(twin, document[None]), expected, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_loss_packed_and_padded(name):
    ours, theirs = tiny_model(name, "drawplate"), tiny_model(name, "eager")
    alone = [theirs(input_ids=document[None], use_cache=False).logits[0] for document in DOCUMENTS]
    borders = (0, 5, 6, 29, 40)
    row = torch.cat(DOCUMENTS)[None]
    positions = torch.cat([torch.arange(len(document)) for document in DOCUMENTS])[None]
    packed = ours(input_ids=row, position_ids=positions, use_cache=False, **packing(borders)).logits[0]
    assert torch.allclose(packed, torch.cat(alone), **CLOSE)
    crossing = ours(input_ids=row, position_ids=positions, use_cache=False).logits[0]
    assert not torch.allclose(crossing, torch.cat(alone), rtol=1e-2, atol=1e-2)

    padded = torch.nn.utils.rnn.pad_sequence(DOCUMENTS, batch_first=True)
    mask = torch.arange(23)[None] < torch.tensor([[len(document)] for document in DOCUMENTS])
    logits = ours(input_ids=padded, attention_mask=mask.long(), use_cache=False).logits
    for row_TV, expected_TV in zip(logits, alone, strict=True):
        assert torch.allclose(row_TV[: len(expected_TV)], expected_TV, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_models_generate_as_with_their_own_attention(name):
    prompt = DOCUMENTS[3][None]
    tokens = [
        tiny_model(name, implementation).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        for implementation in ("drawplate", "eager")
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_before_ampere_gets_no_variable_length_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    if not {"scale", "window_size"} <= causal_attention.VARLEN_ARGUMENTS:
        pytest.skip("this torch has none that would do")
    monkeypatch.setattr(causal_attention, "flash_runs", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    register()
    x_BHTD = torch.empty(1, 2, 16, 64, dtype=torch.float16, device="meta")
    rule = causal_attention.Rule(scaling=1.0, window=None, softcap=None)
    assert causal_attention.varlen_serves(x_BHTD, x_BHTD, x_BHTD, rule, packed=True) is runs
    assert build_anatomy(LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1)).one_by_one is not runs
