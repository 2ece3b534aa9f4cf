"""The parity runner: recorded published outputs agree, a changed one is noticed, other constructors build and load."""
from __future__ import annotations

import fnmatch
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parent / "parity"
sys.path.insert(0, str(FOLDER))

import run as parity  # noqa: E402

from nextscale.canvas import Canvas  # noqa: E402
from nextscale.conditions.class_label import ClassCondition  # noqa: E402
from nextscale.errors import WeightsError  # noqa: E402
from nextscale.sampling.score import hidden_states  # noqa: E402
from nextscale.systems.folders import load_published  # noqa: E402
from nextscale.systems.var import VAR  # noqa: E402
from nextscale.systems.var_published import published_config  # noqa: E402
from nextscale.tokenizers import pyramid  # noqa: E402

# Recorded tensors that are given to the library instead of being compared with what it makes.
INPUTS = ("image", "control_image", "labels", "latent", "latents", "mask_positions", "*uniform*", "*noise*",
          "loss_time", "loss_time.*", "*orders", "*.x_T.*", "train_t", "train_label_drop", "train_labels",
          "train_big_rate", "train_pivots_off", "small_latents", "small_t", "big_t", "*x_T", "head_x0", "head_z",
          "head_t", "step_x", "step_z", "inpaint.known", "*.text", "*bsc_flip_mask*", "*.encoder_features",
          "text", "forced_bits.*", "select.x.*", "select.cache.*", "select.output.*", "update.*.keys.*",
          "update.*.values.*", "update.*.queries.*")

GOLDENS = sorted(FOLDER.glob("*.json"))
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def changed(folder: Path, change: Change, source: Path = FOLDER / "var_tiny.json") -> str:
    """A copy of a golden set with something changed."""
    golden, recorded = json.loads(source.read_text()), load_file(source.with_suffix(".safetensors"))
    change(golden, recorded)
    (folder / "golden.json").write_text(json.dumps(golden))
    save_file({n: t.contiguous() for n, t in recorded.items()}, folder / "golden.safetensors")
    return str(folder / "golden.json")


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_published_outputs_agree(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(golden)]) == 0
    lines = capsys.readouterr().out.splitlines()
    held = load_file(golden.with_suffix(".safetensors"))
    # Without the picture, its features are given, or else its tokens.
    given = () if "image" in held else ("encoder_features",) if "encoder_features" in held else ("tokens.*",)
    recorded = [n for n in held if not any(fnmatch.fnmatchcase(n, pattern) for pattern in (*INPUTS, *given))]
    assert sorted(line.split()[1] for line in lines[:-1]) == sorted(recorded)


@pytest.mark.parametrize("name", ["encoder_features", "var_input", "reconstruction", "teacher_forced_logits"])
def test_a_changed_tensor_is_a_miss(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        recorded[name].flatten()[7] += 0.01

    assert parity.main([changed(tmp_path, change)]) == 1
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")] == [name]


@pytest.mark.parametrize("name", ["tokens.2", "greedy_tokens.3"])
def test_a_changed_token_is_a_miss(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        recorded[name].flatten()[5] = (recorded[name].flatten()[5] + 1) % 64

    assert parity.main([changed(tmp_path, change)]) == 1
    assert f"MISS {name} " in capsys.readouterr().out


def test_another_row_that_stays_is_a_miss_where_no_tie_excuses_it(tmp_path: Path,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    names = ["shipped.dropped.scale7.layer0", "update.1.layer1.kept.3"]

    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        for name in names:
            rows = recorded[name][0, 0]
            rows[0] = next(row for row in range(99) if row not in rows)
            rows.copy_(rows.sort().values)

    assert parity.main([changed(tmp_path, change, FOLDER / "scalekv_tiny.json")]) == 1
    missed = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("MISS")]
    assert set(names) <= set(missed)


def test_weights_of_another_rule_are_a_miss(tmp_path: Path) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        golden["after_fill"] = {}

    assert parity.main([changed(tmp_path, change)]) == 1


def test_optional_fields_and_tensors_may_be_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        for field in ("hash_prefix", "buffers", "tolerance", "tensors", "notes", "published_code", "name_rule"):
            del golden[field]
        for name in ("encoder_features", "var_input", "labels"):
            del recorded[name]

    assert parity.main([changed(tmp_path, change)]) == 0
    assert "reconstruction" in capsys.readouterr().out


@pytest.mark.parametrize("tolerance", [
    5e-4, "1e-3", {"default": 1e-3}, {"features_inputs_logits": 2e-4, "images": 1e-3, "tokens": "equal"},
    {"*_image": 1e-3, "reconstruction": "0.001", "tokens.k": "equal", "default": 2e-4}])
def test_tolerances_come_in_several_forms(tolerance: Any, tmp_path: Path) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        golden["tolerance"] = tolerance

    assert parity.main([changed(tmp_path, change)]) == 0


def test_the_tolerance_decides(tmp_path: Path) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        golden["tolerance"] = {"default": 1e-3, "encoder_*": 0.0}
        recorded["encoder_features"].flatten()[0] += 1e-5

    assert parity.main([changed(tmp_path, change)]) == 1


def test_nothing_to_compare_is_no_success(tmp_path: Path) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        for name in list(recorded):
            if name != "image":
                del recorded[name]

    assert parity.main([changed(tmp_path, change)]) == 1


def test_unknown_systems_and_unreadable_sets_exit_with_2(tmp_path: Path) -> None:
    def change(golden: dict[str, Any], recorded: dict[str, Tensor]) -> None:
        golden["system"] = "no-such-system"

    path = Path(changed(tmp_path, change))
    assert parity.main([str(path)]) == 2
    assert parity.main([]) == 2
    assert parity.main([str(tmp_path / "absent.json")]) == 2
    shutil.copy(FOLDER / "var_tiny.json", path)
    path.with_suffix(".safetensors").write_bytes(b"short")
    assert parity.main([str(path)]) == 2
    path.write_text("{")
    assert parity.main([str(path)]) == 2


# Constructors that no recorded set here has: build, fill by the rule, load strictly, and agree with oneself.

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shared modulation, one phi": ({"share_quant_resi": 1}, {"shared_aln": True}),
    "plain attention, a phi a scale": ({"share_quant_resi": 0}, {"attn_l2_norm": False}),
    "five scales, wider latent": ({"v_patch_nums": [1, 2, 3, 5, 6], "z_channels": 12, "vocab_size": 50},
                                  {"patch_nums": [1, 2, 3, 5, 6]}),
    "ten scales": ({"v_patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]},
                   {"patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "depth": 1}),
    "three heads, two phis": ({"share_quant_resi": 2}, {"embed_dim": 96, "num_heads": 3, "mlp_ratio": 2.0}),
}


def state_dict_of(system: VAR, vae: dict[str, Any], var: dict[str, Any]) -> dict[str, list[int]]:
    """Published names and shapes of a constructor, changed from those of the recorded set."""
    golden = json.loads((FOLDER / "var_tiny.json").read_text())
    width, depth, heads = var["embed_dim"], var["depth"], var["num_heads"]
    sides, z, vocabulary = vae["v_patch_nums"], vae["z_channels"], vae["vocab_size"]
    length, shapes = sum(s * s for s in sides), {}
    for name, shape in golden["state_dict"].items():
        if name.startswith("vae.quantize.quant_resi"):
            continue
        if name.startswith("vae."):
            scale = vae["ch"] // 32
            ends = ("conv_in", "conv_out", "quant_conv", "embedding", "ema_vocab")
            if not any(end in name for end in ends):
                shape = [s * scale if s % 32 == 0 else s for s in shape]
            elif "embedding" in name:
                shape = [vocabulary, z]
            elif "ema_vocab" in name:
                shape = [len(sides), vocabulary]
            elif "quant_conv" in name:
                shape = [z, z, 3, 3][:len(shape)] if len(shape) > 1 else [z]
            else:
                shape = [z if s == 8 else s * scale if s % 32 == 0 else s for s in shape]
            shapes[name] = shape
    phis = vae["share_quant_resi"]
    names = ["qresi"] if phis == 1 else [str(i) for i in range(len(sides))] if phis == 0 else [
        f"qresi_ls.{i}" for i in range(phis)]
    for name in names:
        shapes[f"vae.quantize.quant_resi.{name}.weight"] = [z, z, 3, 3]
        shapes[f"vae.quantize.quant_resi.{name}.bias"] = [z]
    inner = round(width * var["mlp_ratio"])
    of_block = {"attn.q_bias": [width], "attn.v_bias": [width], "attn.zero_k_bias": [width],
                "attn.mat_qkv.weight": [3 * width, width], "attn.proj.weight": [width, width],
                "attn.proj.bias": [width], "ffn.fc1.weight": [inner, width], "ffn.fc1.bias": [inner],
                "ffn.fc2.weight": [width, inner], "ffn.fc2.bias": [width]}
    if var["attn_l2_norm"]:
        of_block["attn.scale_mul_1H11"] = [1, heads, 1, 1]
    if var["shared_aln"]:
        of_block["ada_gss"] = [1, 1, 6, width]
        shapes |= {"var.shared_ada_lin.1.weight": [6 * width, width], "var.shared_ada_lin.1.bias": [6 * width]}
    else:
        of_block |= {"ada_lin.1.weight": [6 * width, width], "ada_lin.1.bias": [6 * width]}
    shapes |= {f"var.blocks.{i}.{name}": shape for i in range(depth) for name, shape in of_block.items()}
    return {**shapes, "var.pos_start": [1, sides[0] ** 2, width], "var.pos_1LC": [1, length, width],
            "var.lvl_1L": [1, length], "var.attn_bias_for_masking": [1, 1, length, length],
            "var.word_embed.weight": [width, z], "var.word_embed.bias": [width],
            "var.class_emb.weight": [var["num_classes"] + 1, width], "var.lvl_embed.weight": [len(sides), width],
            "var.head_nm.ada_lin.1.weight": [2 * width, width], "var.head_nm.ada_lin.1.bias": [2 * width],
            "var.head.weight": [vocabulary, width], "var.head.bias": [vocabulary]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_constructors_build_fill_and_load_strictly(variant: str, tmp_path: Path) -> None:
    golden = json.loads((FOLDER / "var_tiny.json").read_text())
    vae = {**golden["constructor"]["vae"], **VARIANTS[variant][0]}
    var = {**golden["constructor"]["var"], "mlp_ratio": 4.0, **VARIANTS[variant][1]}
    system = VAR(published_config(vae, var)).eval()
    golden |= {"constructor": {"vae": vae, "var": var}, "state_dict": state_dict_of(system, vae, var)}
    golden["buffers"] = [n for n in golden["state_dict"]
                         if n.endswith(("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV"))]
    weights = parity.fill(golden)
    load_published(system, weights["vae"], weights["var"])
    side = 16 * vae["v_patch_nums"][-1]
    image = load_file(FOLDER / "var_tiny.safetensors")["image"][:1]
    image = torch.nn.functional.interpolate(image, size=(side, side), mode="bilinear")
    with torch.no_grad():
        found = system.tokenizer.encode(image)
        canvas = pyramid.replay(found.tokens, Canvas.empty(system.plan, system.tokenizer.quantiser, 1)).canvas
        logits = system.head(hidden_states(system, system.plan, found.reads,
                                           ClassCondition(system.labels, torch.tensor([[3]])), ("conditional",)))
        recorded = {"image": image, "reconstruction": system.tokenizer.decode(canvas), "teacher_forced_logits": logits,
                    "labels": torch.tensor([3])}
    recorded |= {f"tokens.{k}": t for k, t in enumerate(found.tokens)}
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    save_file({n: t.contiguous() for n, t in recorded.items()}, tmp_path / "golden.safetensors")
    assert float(logits.std()) > 0.3
    assert parity.main([str(tmp_path / "golden.json")]) == 0
    for part, wrong in (("vae", {**weights["vae"], "stranger": torch.zeros(3)}),
                        ("var", {n: t for n, t in weights["var"].items() if n != "head.bias"})):
        with pytest.raises(WeightsError, match="stranger" if part == "vae" else "head.bias"):
            load_published(system, **{"tokenizer" if part == "vae" else "generator": wrong})
