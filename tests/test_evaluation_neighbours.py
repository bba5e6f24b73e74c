from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import normal

from maskdm.evaluation import nearest


@pytest.mark.parametrize("block", [7, 64, 4096])
def test_nearest_is_brute_force_in_any_block(block: int) -> None:
    queries, references = normal(50, 5, 15), normal(80, 5, 16)
    found = nearest(queries, references, k=3, block=block)
    expected = np.linalg.norm(queries.double().numpy()[:, None] - references.double().numpy(), axis=2)
    np.testing.assert_array_equal(found.indices, np.argsort(expected, axis=1)[:, :3])
    np.testing.assert_allclose(found.distances, np.sort(expected, axis=1)[:, :3], rtol=1e-12)


def test_nearest_finds_a_copy_at_exactly_zero() -> None:
    references = normal(90, 64, 17, shift=100)
    found = nearest(references[[5, 70]], references, block=16)
    assert found.indices.flatten().tolist() == [5, 70]
    assert found.distances.flatten().tolist() == [0, 0]
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = images[[9]].clone()
    changed[0, 0, 0, 0] ^= 1
    assert nearest(changed, images).distances.item() == 1
    with pytest.raises(ValueError, match="k is 91"):
        nearest(references, references, k=91)
