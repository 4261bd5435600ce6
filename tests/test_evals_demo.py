"""The demo end to end at a small size, and its parts."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attnlab.evals import demo, demo_model

SMALL = ["--quick", "--tokens", "1024", "--layers", "1", "--device", "cpu"]


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    assert demo.main([*SMALL, "--out", str(tmp_path / "made")]) == 0
    out, err = capsys.readouterr()
    record = json.loads((tmp_path / "made" / "demo-cpu.json").read_text())
    assert demo.markdown(record) in out and "agrees to rounding" in out
    assert "100%" in err and "\r" not in err
    assert (tmp_path / "made" / "demo-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert {row["tokens"] for row in record["rows"]} == {128, 256, 512, 1024}
    full = {row["variant"]: row for row in record["rows"] if row["tokens"] == 1024}
    assert len(full) == 4 and full["SDPA dense"]["speedup"] == 1.0
    sparse = full["MoBA B=64 k=8"]["agreement"]
    assert min(s["top1"] for s in sparse["stretches"][:3]) > 0.99  # 8 blocks of 64: the first 512 see all keys
    assert sparse["stretches"][3]["error"] > 0 and sparse["stretches"][0]["error"] < 1e-4
    assert record["exactness"]["holds"] and record["exactness"]["top1"] > 0.99


def test_demo_fails_when_all_blocks_are_not_dense(tmp_path, capsys, monkeypatch):
    honest = demo_model.run

    def off(model, variant, ids):
        done = honest(model, variant, ids)
        return done._replace(logits=done.logits + 1e-3) if "all blocks" in variant.name else done

    monkeypatch.setattr(demo_model, "run", off)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(demo, "variants", lambda quick: [demo.DENSE, demo_model.Variant("MoBA", 128, 2)])
    assert demo.main([*SMALL, "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "DISAGREES" in out and err.splitlines()[-1].startswith("demo: MoBA over all blocks must equal")


def test_text_is_this_pythons_library():
    ids = demo_model.stdlib_text(5000)
    assert ids.shape == (1, 5000) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < 256
    assert "import" in bytes(ids[0].tolist()).decode("utf-8", "replace")
    assert torch.equal(ids[:, :100], demo_model.stdlib_text(100))
    with pytest.raises(ValueError, match="bytes of source, 10000000000 are needed"):
        demo_model.stdlib_text(10**10)


def test_agreement_says_where_it_fell():
    dense = torch.eye(4).repeat(2, 1)
    sparse = dense.clone()
    sparse[6] = sparse[7]
    found = demo_model.agreement(dense, sparse, [0, 4, 8])
    assert found["top1"] == 7 / 8
    assert [(s["start"], s["end"], s["top1"]) for s in found["stretches"]] == [(0, 4, 1.0), (4, 8, 0.75)]
    assert found["stretches"][0]["error"] == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tokens", "1000"], "--tokens must be a multiple of 8 and at least 1024, got 1000"),
        (["--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        (["--layers", "0"], "--layers must be a positive int, got 0"),
        (["--out", __file__], f"--out must be a folder, {__file__} is a file"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from"),
    ],
)
def test_bad_options_give_one_clear_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.parse(options)
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"demo: error: {complaint}")


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        demo.parse([])
    assert "transformers and matplotlib not installed: pip install 'attnlab[evals]'" in capsys.readouterr().err
