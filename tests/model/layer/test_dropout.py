"""The mask is a function of the token, drops the share it should, and neighbours know nothing of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drawplate.data.batches import Batch, cut_packed, cut_padded
from drawplate.kernels.dropped_product import dropout_mask, mix, wrap_int32
from drawplate.model.layer.dropout import module_keys, token_keys
from tests.model.conftest import random_sequences

TOKENS, FEATURES = 512, 256
SALTS = torch.tensor([17, 18, 19, -5], dtype=torch.int32)
STANDARD_DEVIATIONS = 5  # one test in two million fails by chance


def keys(seed: int = 3, epoch: int = 0, sequence: int = 0, tokens: int = TOKENS) -> torch.Tensor:
    positions = torch.arange(tokens)[None]
    return token_keys(torch.full_like(positions, sequence), positions, seed, epoch)


def kept(key_BT: torch.Tensor, dropout: float = 0.5, features: int = FEATURES) -> torch.Tensor:
    """Which are kept, 0 or 1, shape (T, features)."""
    return (dropout_mask(key_BT, features, dropout, torch.float32)[0] > 0).float()


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 10**12])
def test_the_share_dropped_is_the_share_asked_for(dropout: float, seed: int) -> None:
    mask = kept(module_keys(keys(seed), SALTS[:1])[0], dropout)
    allowed = STANDARD_DEVIATIONS * math.sqrt(dropout * (1 - dropout) / mask.numel())
    assert abs(float(mask.mean()) - (1 - dropout)) < allowed
    for axis, count in ((0, TOKENS), (1, FEATURES)):
        spread = STANDARD_DEVIATIONS * math.sqrt(dropout * (1 - dropout) / count)
        spread += STANDARD_DEVIATIONS**2 / (3 * count)  # Bernstein's term: a count of few drops is skewed
        assert float((mask.mean(axis) - (1 - dropout)).abs().max()) < spread, "no feature and no token is favoured"


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    values = dropout_mask(keys(), FEATURES, 0.2, torch.float32).unique()
    assert values.tolist() == pytest.approx([0, 1.25])
    assert dropout_mask(keys(), FEATURES, 0.2, torch.bfloat16).dtype == torch.bfloat16


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


def assert_independent(a: torch.Tensor, b: torch.Tensor) -> None:
    assert abs(correlation(a, b)) < STANDARD_DEVIATIONS / math.sqrt(a.numel())


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 8, 16, 64, 128])
def test_neighbouring_features_and_tokens_are_independent(distance: int) -> None:
    mask = kept(module_keys(keys(), SALTS[:1])[0])
    assert_independent(mask[:, distance:], mask[:, :-distance])
    assert_independent(mask[distance:], mask[:-distance])
    assert_independent(mask[distance:, distance:], mask[:-distance, :-distance])
    assert_independent(mask[distance:, :-distance], mask[:-distance, distance:])


def test_modules_sequences_epochs_and_seeds_are_independent() -> None:
    masks = [kept(key) for key in module_keys(keys(), SALTS)]
    others = [keys(seed=4), keys(epoch=1), keys(sequence=1), keys(sequence=2), keys(sequence=2**20)]
    masks += [kept(module_keys(other, SALTS[:1])[0]) for other in others]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert_independent(mask, other)


def test_a_weaker_hash_would_be_noticed() -> None:
    """The negative control: one multiplication in place of the mix correlates neighbours."""
    feature = torch.arange(FEATURES, dtype=torch.int32) * -1640531527
    weak = ((keys()[0][:, None] + feature) >= 0).float()
    assert abs(correlation(weak[:, 1:], weak[:, :-1])) > STANDARD_DEVIATIONS / math.sqrt(weak.numel())


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=50, unique=True))
def test_the_mix_is_a_bijection(values: list[int]) -> None:
    mixed = mix(torch.tensor(values, dtype=torch.int32))
    assert len(mixed.unique()) == len(values)


def test_one_bit_changes_half_of_the_bits() -> None:
    values = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    for bit in range(32):
        flipped = mix(values) ^ mix(values ^ wrap_int32(1 << bit))
        changed = np.unpackbits(flipped.numpy().view(np.uint8)).reshape(len(values), 32).mean()
        assert 0.47 < changed < 0.53, bit


@given(st.integers(-(10**30), 10**30))
def test_any_integer_wraps_to_its_low_bits(value: int) -> None:
    assert -(2**31) <= wrap_int32(value) < 2**31
    assert (wrap_int32(value) - value) % 2**32 == 0


def masks_of(batches: list[Batch], seed: int = 3) -> dict[int, torch.Tensor]:
    """Each sequence's mask, cut out of whatever row it is in."""
    found: dict[int, torch.Tensor] = {}
    for batch in batches:
        key = module_keys(token_keys(batch.sequence_ids_BT, batch.position_ids_BT, seed, 0), SALTS[:1])[0]
        mask = dropout_mask(key, FEATURES, 0.3, torch.float32)
        for sequence in batch.sequence_ids_BT.unique().tolist():
            found[sequence] = mask[batch.sequence_ids_BT == sequence]
    found.pop(-1, None)
    return found


def test_a_sequence_has_its_mask_wherever_it_lies() -> None:
    sequences = random_sequences([17, 5, 30, 9, 2, 23])
    whole = masks_of(cut_padded(sequences, 6, 16, 0))
    cuts = [cut_padded(sequences, 1, 1, 0), cut_padded(sequences, 2, 8, 0), cut_packed(sequences, 64, 16, 0)]
    for batches in cuts:
        again = masks_of(batches)
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    other = masks_of(cuts[0], seed=4)
    assert not any(torch.equal(other[name], whole[name]) for name in whole)


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first, state = kept(keys()), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(kept(keys()), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
