"""Presets: impossible values, the network they describe, and runs that an older version began."""

import json
from dataclasses import asdict, fields, replace

import pytest

from models.levels import FULL_VIEWS
from models.presets import DELETED, PRESETS, RENAMED, Preset, of_this_version
from models.unet import UNet, UNetConfig
from utils.errors import InputError


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_can_be(name):
    PRESETS[name].check()
    network = PRESETS[name].network()
    assert isinstance(network, UNetConfig)
    for field in fields(UNetConfig):  # what a preset says of the network is what the network is
        if hasattr(PRESETS[name], field.name):
            assert getattr(network, field.name) == getattr(PRESETS[name], field.name)


def test_a_preset_says_everything_of_a_network_but_its_multipliers():
    assert {field.name for field in fields(UNetConfig)} - {field.name for field in fields(Preset)} == {"multipliers"}
    assert UNet(replace(PRESETS["tiny"], stem=1).network()).config.multiple == 8


@pytest.mark.parametrize("change, text", [
    ({"loss": "l1"}, "loss is 'l1'; expected mse or rmse"), ({"batch": 0}, "batch is 0; expected 1 or more"),
    ({"update": "shifted"}, "expected shift or naive"), ({"val_sampler": "ddim"}, "one-step or sequential"),
    ({"estimates_by": "both"}, "expected ema or own"), ({"precision": "fp16"}, "fp32 or bf16 or fp64"),
    ({"lr": float("nan")}, "lr is nan; expected 0 or more"), ({"lr": float("inf")}, "not finite"),
    ({"any_view_share": 1.0}, "share from 0 to below 1"), ({"focus_share": -0.1}, "focus_share is -0.1"),
    ({"jumps": 1.1}, "jumps is 1.1; expected a share from 0 to 1"), ({"scale": 0}, "positive number"),
    ({"focus_views": "18 x"}, "focus_views is '18 x'"), ({"focus_views": f"{FULL_VIEWS + 1}"}, "from 1 to 720"),
    ({"focus_views": " "}, "expected counts"), ({"channels": 3}, "channels is 3"),
    ({"residual_channel": "anchored", "channels": 1}, "needs channels 2"), ({"width": 40}, "multiple of 32"),
    ({"told_photons": True}, "needs a noise_share"), ({"fewest_photons": 1e8}, "1e\\+08 and most_photons 1e\\+07"),
    ({"noise_share": 1.1}, "share from 0 to 1"), ({"electronic": float("inf")}, "electronic is not finite"),
    ({"val_sampler": "reco"}, "val_sampler reco needs channels 2 and residual_channel two-pass"),
    ({"val_sampler": "reco", "channels": 2, "residual_channel": "anchored"}, "two-pass")])
def test_values_that_cannot_be_are_refused_with_the_reason(change, text):
    with pytest.raises(InputError, match=text):
        replace(PRESETS["paper"], **change).check()


def older(preset: Preset, **fields) -> dict:
    """What run.json of an older version holds of a preset: old names, and fields that are gone."""
    names = {new: old for old, new in RENAMED.items()}
    found = {names.get(name, name): value for name, value in preset.mathematics().items()}
    return json.loads(json.dumps(found | DELETED | fields))


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_of_an_older_version_goes_on(name):
    found = older(PRESETS[name])
    assert {"between", "focus", "rollout", "combined", "rotate", "zoom", "translate", "starts"} <= set(found)
    before = dict(found)
    assert of_this_version(found) == PRESETS[name].mathematics() and found == before
    assert of_this_version(PRESETS[name].mathematics()) == PRESETS[name].mathematics(), "one of this version as well"


def test_renamed_fields_keep_their_values():
    found = older(PRESETS["paper"], between=0.25, focus=0.125, rollout="own")
    assert of_this_version(found) == replace(PRESETS["paper"], any_view_share=0.25, focus_share=0.125,
                                             estimates_by="own").mathematics()


def test_a_field_that_is_younger_than_the_run_has_its_default():
    found = older(PRESETS["tiny"])
    for name in ("dc", "residual_channel", "starts", "between"):
        del found[name]
    expected = replace(PRESETS["tiny"], dc=0, residual_channel="two-pass", any_view_share=0.0)
    assert of_this_version(found) == expected.mathematics()


@pytest.mark.parametrize(("name", "value"), [("combined", True), ("rotate", 5.0), ("zoom", 0.1), ("translate", 0.02),
                                             ("starts", 4), ("loss", "spectral"), ("loss", "charbonnier")])
def test_a_run_that_used_what_is_gone_is_told_so(name, value):
    assert name in (*DELETED, "loss")
    with pytest.raises(InputError, match=f"begun with {name} {value}, which this version no longer has; go on with"):
        of_this_version(older(PRESETS["tiny"], **{name: value}))


def test_what_only_changes_rounding_may_differ_on_resume():
    tiny = PRESETS["tiny"]
    free = replace(tiny, accumulate=2, patience=3)
    assert free.mathematics() == tiny.mathematics() != replace(tiny, lr=1.0).mathematics()
    assert set(asdict(tiny)) - set(tiny.mathematics()) == {"accumulate", "patience"}
