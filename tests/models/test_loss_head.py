"""The loss head and its supervised loss, against full logits in float64; and what configurations say of logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from repo_fast.errors import InputError
from repo_fast.models.loss_head import LogitSettings, LossHead, Projection, logit_settings, summed_cross_entropy

PLAIN, SCALED, CAPPED = LogitSettings(), LogitSettings(0.25), LogitSettings(2.0, 3.0)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [PLAIN, SCALED, CAPPED], ids=["plain", "scaled", "capped"])
def test_cross_entropy_in_the_head(settings: LogitSettings, bias: bool, backend: str, ignored: float) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=g) for shape in ((23, 16), (31, 16), (31,))[: 2 + bias]]
    targets = torch.randint(31, (23,), generator=g)
    targets[torch.rand(23, generator=g) < ignored] = -100
    head = LossHead(16, 31, bias=bias)
    head.settings = settings
    hidden = inputs[0].clone().requires_grad_()
    with torch.no_grad():
        head.weight.copy_(inputs[1])
        if bias:
            head.bias.copy_(inputs[2])
    loss = head(hidden, lambda h, projection: summed_cross_entropy(h, projection, targets, backend=backend))
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    logits = settings.logit_scale * F.linear(*wide)
    if settings.softcap is not None:
        logits = settings.softcap * (logits / settings.softcap).tanh()
    truth = F.cross_entropy(logits, targets, reduction="sum")
    assert abs(loss.item() - truth.item()) <= 1e-5 * max(truth.item(), 1.0)
    ours = torch.autograd.grad(3 * loss, [hidden, *head.parameters()])
    for value, expected in zip(ours, torch.autograd.grad(3 * truth, wide), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()
    seen = head(hidden, lambda h, projection: projection.logits(h))
    torch.testing.assert_close(seen.double(), logits, atol=1e-5, rtol=1e-5)


def test_a_head_without_a_loss_is_a_linear_layer() -> None:
    head, plain = LossHead(6, 9), nn.Linear(6, 9)
    head.load_state_dict(plain.state_dict())
    head.settings = CAPPED
    hidden = torch.randn(2, 3, 6)
    assert torch.equal(head(hidden), plain(hidden))


def settings_of(config: PretrainedConfig) -> LogitSettings:
    return logit_settings("folder", config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@pytest.mark.parametrize(
    ("model_type", "options", "expected"),
    [
        ("llama", {}, PLAIN),
        ("granite", {"logits_scaling": 8.0}, LogitSettings(1 / 8)),
        ("hyperclovax", {"logits_scaling": 8.0}, LogitSettings(8.0)),
        ("cohere", {"logit_scale": 0.0625}, LogitSettings(0.0625)),
        ("falcon_h1", {"lm_head_multiplier": 0.5}, LogitSettings(0.5)),
        ("gemma2", {"final_logit_softcapping": 20.0}, LogitSettings(1.0, 20.0)),
        ("gemma2", {"final_logit_softcapping": None}, PLAIN),
        ("gemma3_text", {"final_logit_softcapping": None}, PLAIN),
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, LogitSettings(1.0, 30.0)),
        ("xlstm", {"output_logit_soft_cap": 30.0}, LogitSettings(1.0, 30.0)),
    ],
)
def test_settings_have_the_names_of_transformers(
    model_type: str, options: dict[str, Any], expected: LogitSettings
) -> None:
    assert settings_of(CONFIG_MAPPING[model_type](**options)) == expected


@pytest.mark.parametrize("value", [0.0, -8.0, float("nan"), float("inf"), 1e5])
def test_settings_that_are_no_factors_are_refused(value: Any) -> None:
    config = CONFIG_MAPPING["granite"]()
    config.logits_scaling = value
    with pytest.raises(InputError, match="'folder' has logits_scaling = .*, expected a number above 0"):
        settings_of(config)


@pytest.mark.parametrize(("model_type", "name"), [("llama", "final_logit_softcapping"), ("mpt", "logit_scale")])
def test_settings_that_a_class_does_not_look_at_have_no_effect(model_type: str, name: str) -> None:
    """transformers makes nothing of them."""
    config = CONFIG_MAPPING[model_type]()
    setattr(config, name, 3.0)
    assert settings_of(config) == PLAIN


def test_a_projection_is_what_the_ops_take() -> None:
    weight = torch.randn(5, 3)
    assert Projection(weight).options == {"logit_scale": 1.0, "softcap": None}
    assert Projection(weight, CAPPED).options == {"logit_scale": 2.0, "softcap": 3.0}
