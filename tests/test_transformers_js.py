"""A folder for transformers.js holds greedy settings with the captioner's own rules, and other captioners are refused."""

import json

import numpy as np
import pytest
from small_captioners import build

import export_onnx


@pytest.fixture(scope="module", params=["", "a big"])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("js")
    captioner = build("vit_gpt2", request.param)
    captioner.model.generation_config.no_repeat_ngram_size = 2
    captioner.model.generation_config.min_length = 5
    captioner.save(folder / "model")
    export_onnx.main([str(folder / "model"), str(folder / "js"), "--format", "transformers.js"])
    return captioner, folder / "js"


def test_the_settings_are_greedy_and_keep_prompt_and_rules(exported):
    captioner, folder = exported
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["num_beams"] == 1 and not settings["do_sample"]
    assert settings["no_repeat_ngram_size"] == 2 and settings["min_length"] == 5
    assert np.ravel(settings["decoder_start_token_id"]).tolist() == captioner.start_token_ids


def test_an_lstm_captioner_is_refused(tmp_path, capsys):
    build("lstm").save(tmp_path / "model")
    with pytest.raises(SystemExit) as exit_:
        export_onnx.main([str(tmp_path / "model"), str(tmp_path / "js"), "--format", "transformers.js"])
    assert exit_.value.code not in (0, None) and not (tmp_path / "js").exists()
