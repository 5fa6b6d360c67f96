"""Packing: what a sequence computes does not depend on its company."""

import pytest
import torch

from repo_fast.models.policy import Policy
from repo_fast.packing.rows import idle_batch, pack
from tests.tiny import save_policy

CPU = torch.device("cpu")


def test_pack_by_hand():
    packed = pack([torch.tensor([1, 2]), torch.tensor([3])], [torch.tensor([4]), torch.tensor([5, 6])], CPU)
    assert packed.input_ids.tolist() == [[1, 2, 4, 3, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.predictors.tolist() == [1, 3, 4]
    assert packed.targets.tolist() == [4, 5, 6]
    assert packed.sequence_ids.tolist() == [0, 1, 1]
    assert packed.last.tolist() == [2, 5]


def test_an_idle_batch_has_nothing_to_predict():
    batch = idle_batch(CPU)
    assert batch.targets.tolist() == [-100] and batch.input_ids.numel() == 2


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = save_policy(tmp_path_factory.mktemp("policy"))
    return Policy.from_pretrained(str(path), dtype=torch.float64, attention="sdpa")


def test_a_sequence_cannot_see_its_neighbours(policy):
    torch.manual_seed(0)
    prompts = [torch.randint(3, 24, (n,)) for n in (1, 5, 3)]
    responses = [torch.randint(3, 24, (n,)) for n in (7, 1, 4)]

    def hidden(batch):
        return policy(batch, lambda states, projection, _: states @ projection.weight.T)

    together = hidden(pack(prompts, responses, CPU))
    alone = torch.cat([hidden(pack([p], [r], CPU)) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    other = [*prompts[:1], torch.randint(3, 24, (9,)), *prompts[2:]]
    changed = hidden(pack(other, responses, CPU))
    torch.testing.assert_close(changed[-4:], alone[-4:], atol=1e-12, rtol=0)


def test_the_head_sees_only_the_states_that_predict_a_response_token(policy):
    packed = pack([torch.tensor([5, 6, 7])], [torch.tensor([8, 9])], CPU)
    full = policy.model(input_ids=packed.input_ids).logits[0]
    ours = policy(packed, lambda states, projection, batch: states @ projection.weight.T)
    torch.testing.assert_close(ours, full[2:4], atol=1e-12, rtol=0)
