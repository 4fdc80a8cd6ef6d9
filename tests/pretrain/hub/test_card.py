"""The model card names each data set of the training with its licence, as stated; unknown ones are said to be unknown."""

from __future__ import annotations

import pytest

from infra.errors import UserError
from pretrain.hub.card import model_card
from pretrain.weights.encoder import Encoder
from tests.pretrain.weights import encoders
from tests.pretrain.weights.encoders import CONFIG, PREPROCESSING, write_small_encoder

GRID = {"shape": [20, 24, 20], "spacing": [6.0] * 3}


def card(**config):
    return model_card({**CONFIG, **config}, {**PREPROCESSING, "grid": GRID})


def test_each_data_set_has_a_row_with_its_licence_as_stated():
    text = card(
        licences={"ixi": ["CC BY-SA 3.0"], "clinic": [], "mixed": ["CC0", "DUA 7"], "abide": ["CC BY-NC-SA 3.0"]}
    )
    assert (
        "| ixi | CC BY-SA 3.0 |\n| clinic | unknown (the data set states none) |\n| mixed | CC0 and DUA 7 |\n" in text
    )
    assert "| abide | CC BY-NC-SA 3.0 |\n" in text


def test_nothing_is_said_of_data_that_are_not_recorded():
    assert "licence" not in card()
    assert "Trained on no scans." in card(licences={})


def test_a_licence_cannot_break_the_table_or_hold_markup():
    (row,) = [
        line
        for line in card(licences={"a": ["x | <img src=y>\n\n# [z](http://q)"]}).splitlines()
        if line.startswith("| a")
    ]
    assert row == r"| a | x \| \<img src=y\> \# \[z\](http://q) |"


def test_the_card_of_an_encoder_has_the_licences_of_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CONFIG", {**CONFIG, "licences": {"ixi": ["CC BY-SA 3.0"]}})
    write_small_encoder(tmp_path / "encoder")
    assert "| ixi | CC BY-SA 3.0 |" in (tmp_path / "encoder" / "README.md").read_text()
    assert Encoder.from_pretrained(tmp_path / "encoder").config["licences"] == {"ixi": ["CC BY-SA 3.0"]}


@pytest.mark.parametrize("value", [[], {"ixi": "CC0"}, {"ixi": [1]}, {"ixi": ["x" * 5000]}])
def test_a_config_with_other_licences_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setattr(encoders, "CONFIG", {**CONFIG, "licences": value})
    monkeypatch.setattr("pretrain.weights.write.model_card", lambda *arguments: "")
    write_small_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match="config.json: licences"):
        Encoder.from_pretrained(tmp_path / "encoder")
