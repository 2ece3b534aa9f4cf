"""VAR's transformer: one masked call equals the step loop, nothing flows backwards, published sizes and names fit."""
from __future__ import annotations

import re

import pytest
import torch
from published_shapes import Shapes, conv, on_meta, vqgan
from tiny import GRIDS, emoji, empty_canvas, labels, random_tokens, start, step_logits, tiny_var
from torch import Tensor

import nextscale
from nextscale.conditions.class_label import ClassCondition
from nextscale.errors import InputError, WeightsError
from nextscale.plan import ALL_PREVIOUS, PREVIOUS_ONLY, Plan, Visibility
from nextscale.sampling.guidance import ClassifierFree, Unguided
from nextscale.sampling.score import hidden_states
from nextscale.systems.folders import load_published
from nextscale.systems.var import VAR, preset_config
from nextscale.systems.var_published import published_config
from nextscale.tokenizers import pyramid

VARIANTS: dict[str, dict[str, object]] = {
    "published": {},
    "shared modulation": {"shared_modulation": True},
    "no l2": {"l2_attention": False},
    "one phi": {"phi_count": 1},
    "a phi a scale": {"phi_count": 0},
    "rectangles": {"grids": ((1, 1), (1, 2), (3, 2), (4, 4)), "shared_modulation": True},
    "several start rows": {"grids": ((2, 2), (3, 3), (4, 4)), "l2_attention": False},
    "one scale": {"grids": ((4, 4),)},
    "narrow picture": {"grids": ((1, 1), (2, 1), (6, 3))},
}


def one_call_logits(system: VAR, plan: Plan, tokens: list[Tensor]) -> Tensor:
    reads = pyramid.replay(tokens, empty_canvas(system, len(tokens[0]), plan)).reads
    condition = ClassCondition(system.labels, labels(len(tokens[0])))
    with torch.no_grad():
        return system.head(hidden_states(system, plan, reads, condition, ("conditional",)))


@pytest.mark.parametrize("visible", [ALL_PREVIOUS, PREVIOUS_ONLY, Visibility(2), Visibility(0)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_masked_call_equals_the_step_loop(variant: str, visible: Visibility) -> None:
    system = tiny_var(**VARIANTS[variant])  # type: ignore[arg-type]
    plan = Plan(system.plan.steps, visible)
    tokens = random_tokens(plan, 2)
    wanted = one_call_logits(system, plan, tokens)
    found, _ = step_logits(system, plan, tokens, Unguided())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float(wanted.std()) > 0.1  # else everything would agree


def test_the_loop_reads_what_teacher_forcing_is_given() -> None:
    system = tiny_var()
    tokens = system.encode(emoji(2))
    _, run = step_logits(system, system.plan, tokens, Unguided())
    given = pyramid.replay(tokens, empty_canvas(system, 2))
    assert run.reads[0] is None
    for ours, theirs in zip(run.reads[1:], given.reads[1:], strict=True):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert torch.equal(run.canvas.value, given.canvas.value)


def test_a_prefix_is_filled_in_one_call_like_step_by_step() -> None:
    system = tiny_var()
    tokens = random_tokens(system.plan, 2)
    wanted, _ = step_logits(system, system.plan, tokens, Unguided())
    run = start(system, system.plan, Unguided())
    for given in tokens[:3]:
        run.force(given)
    from nextscale.sampling.steps import evaluator

    with torch.no_grad():
        call = system.generator.call(run)
        logits = system.head(evaluator(system.generator, run, check=True)(call)[:, call.predicts])
    assert len(call.rows) == system.plan.length
    torch.testing.assert_close(logits, wanted[:, system.plan.span(3, 4)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["published", "shared modulation", "no l2", "rectangles"])
def test_tokens_change_the_logits_of_later_scales_only(variant: str) -> None:
    system = tiny_var(**VARIANTS[variant])  # type: ignore[arg-type]
    plan, tokens = system.plan, random_tokens(system.plan, 1)
    before = one_call_logits(system, plan, tokens)
    for j in range(len(plan)):
        changed = list(tokens)
        changed[j] = (tokens[j] + 1) % 32
        moved = (one_call_logits(system, plan, changed) - before).abs().amax((0, 2))
        rows = plan.starts[j + 1]
        assert float(moved[:rows].max()) == 0
        if j + 1 < len(plan):
            later = [float(moved[plan.span(k, k + 1)].max()) for k in range(j + 1, len(plan))]
            assert min(later) > 1e-4


def test_positions_of_one_scale_see_each_other() -> None:
    system = tiny_var()
    plan = system.plan
    reads = pyramid.replay(random_tokens(plan, 1), empty_canvas(system, 1)).reads
    condition = ClassCondition(system.labels, labels(1))
    with torch.no_grad():
        before = hidden_states(system, plan, reads, condition, ("conditional",))
        reads[2] = reads[2].clone()  # type: ignore[union-attr]
        reads[2][:, -1] += 1
        moved = (hidden_states(system, plan, reads, condition, ("conditional",)) - before).abs().amax((0, 2))
    assert float(moved[plan.span(0, 2)].max()) == 0
    assert float(moved[plan.span(2, 3)].min()) > 0


def test_class_and_missing_class_steer() -> None:
    system = tiny_var()
    tokens = [t[:1].repeat(2, 1) for t in random_tokens(system.plan, 1)]
    logits = one_call_logits(system, system.plan, tokens)
    assert float((logits[0] - logits[1]).abs().max()) > 0.1
    guided, _ = step_logits(system, system.plan, tokens, ClassifierFree(1.0))
    torch.testing.assert_close(guided, logits, rtol=0, atol=1e-4)


def test_a_run_of_another_schedule_is_refused() -> None:
    system = tiny_var()
    run = start(system, Plan.scales([1, 2, 4]), Unguided())
    with pytest.raises(InputError, match="schedule"):
        system.generator.call(run)


def test_training_with_label_dropout_and_step_weights() -> None:
    system = tiny_var(drop_path=0.0).train()
    tokens = random_tokens(system.plan, 4)
    loss, by_step, right = system.loss(tokens, labels(4), label_dropout=0.0)
    logits = one_call_logits(system, system.plan, tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(tokens, 1).flatten())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)
    assert by_step.shape == right.shape == (4,)
    only_first, _, _ = system.loss(tokens, labels(4), label_dropout=0.0, step_weights=[1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(only_first.detach(), by_step[0])
    dropped, _, _ = system.loss(tokens, labels(4), label_dropout=1.0)
    null, _, _ = system.loss(tokens, torch.full((4, 1), 5), label_dropout=0.0)
    assert torch.equal(dropped, null) and not torch.equal(dropped, loss)
    loss.backward()
    assert all(p.grad is not None for p in system.generator.parameters())
    assert all(p.grad is None for p in system.tokenizer.parameters())


# Published sizes

SIZES = {"var-d16": 310.28, "var-d20": 600.92, "var-d24": 1033.40, "var-d30": 2010.02, "var-d36-s": 2353.89}


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_to_the_unit(name: str) -> None:
    with torch.device("meta"):
        system = VAR(preset_config(name))
    config = system.config.generator
    c, d, length, steps = config.width, config.depth, system.plan.length, len(system.plan)
    attention = 3 * c * c + 2 * c + config.heads + c * c + c
    mlp = 2 * 4 * c * c + 5 * c
    adaln = 6 * c * c + 6 * c
    blocks = d * (attention + mlp) + (adaln + d * 6 * c if config.shared_modulation else d * adaln)
    rest = (1001 * c + c + length * c + steps * c + (32 * c + c)  # class, start, position, level, word
            + 2 * c * c + 2 * c + c * 4096 + 4096)  # modulation of the head, head
    found = count(system.generator, system.head, system.labels)
    assert found == blocks + rest
    assert round(found / 1e6, 2) == SIZES[name]
    tokenizer = system.tokenizer
    assert round(count(tokenizer) / 1e6, 3) == 108.948
    assert round(count(tokenizer.encoder) / 1e6, 3) == 44.108 and round(count(tokenizer.decoder) / 1e6, 3) == 64.654
    assert round(count(tokenizer.quantiser) / 1e6, 3) == 0.168


# Published names: the tensor lists of the published files, written out from their description.

def published_tokenizer(scales: int = 10) -> Shapes:
    shapes = {**vqgan(160, 32, 32), **conv("quant_conv", 32, 32), **conv("post_quant_conv", 32, 32)}
    for i in range(4):
        shapes |= conv(f"quantize.quant_resi.qresi_ls.{i}", 32, 32)
    return {**shapes, "quantize.embedding.weight": (4096, 32), "quantize.ema_vocab_hit_SV": (scales, 4096)}


def published_transformer(depth: int, sides: tuple[int, ...], shared: bool = False) -> Shapes:
    c, length = 64 * depth, sum(s * s for s in sides)
    shapes: Shapes = {
        "pos_start": (1, 1, c), "pos_1LC": (1, length, c), "lvl_1L": (1, length),
        "attn_bias_for_masking": (1, 1, length, length), "word_embed.weight": (c, 32), "word_embed.bias": (c,),
        "class_emb.weight": (1001, c), "lvl_embed.weight": (len(sides), c), "head_nm.ada_lin.1.weight": (2 * c, c),
        "head_nm.ada_lin.1.bias": (2 * c,), "head.weight": (4096, c), "head.bias": (4096,)}
    if shared:
        shapes |= {"shared_ada_lin.1.weight": (6 * c, c), "shared_ada_lin.1.bias": (6 * c,)}
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {f"{block}.attn.scale_mul_1H11": (1, depth, 1, 1), f"{block}.attn.q_bias": (c,),
                   f"{block}.attn.v_bias": (c,), f"{block}.attn.zero_k_bias": (c,),
                   f"{block}.attn.mat_qkv.weight": (3 * c, c), f"{block}.attn.proj.weight": (c, c),
                   f"{block}.attn.proj.bias": (c,), f"{block}.ffn.fc1.weight": (4 * c, c),
                   f"{block}.ffn.fc1.bias": (4 * c,), f"{block}.ffn.fc2.weight": (c, 4 * c),
                   f"{block}.ffn.fc2.bias": (c,)}
        shapes |= {f"{block}.ada_gss": (1, 1, 6, c)} if shared else {
            f"{block}.ada_lin.1.weight": (6 * c, c), f"{block}.ada_lin.1.bias": (6 * c,)}
    return shapes


@pytest.mark.parametrize("name", ["var-d16", "var-d36-s"])
def test_the_published_tensor_lists_load_strictly(name: str) -> None:
    with torch.device("meta"):
        system = VAR(preset_config(name))
    sides = tuple(h for h, _ in system.config.tokenizer.grids)
    shared = name.endswith("-s")
    tokenizer = published_tokenizer()
    assert len(tokenizer) == 324
    load_published(system, on_meta(tokenizer), on_meta(published_transformer(36 if shared else 16, sides, shared)))


def test_every_published_tensor_is_needed_and_no_other_is_taken() -> None:
    with torch.device("meta"):
        system = VAR(preset_config("var-d16"))
    sides = tuple(h for h, _ in system.config.tokenizer.grids)
    derived = re.compile(r"lvl_1L|attn_bias_for_masking|.*zero_k_bias|quantize\.ema_vocab_hit_SV")
    for whole, given in ((published_tokenizer(), "tokenizer"), (published_transformer(16, sides), "generator")):
        names = [n for n in whole if not derived.fullmatch(n)]
        for gone in names[::37]:
            with pytest.raises(WeightsError, match="missing"):
                load_published(system, **{given: on_meta({n: s for n, s in whole.items() if n != gone})})
        with pytest.raises(WeightsError, match=r"unknown.*stranger\.weight"):
            load_published(system, **{given: on_meta({**whole, "stranger.weight": (1,)})})
        for wrong in names[5::61]:
            with pytest.raises(WeightsError, match=r"wrong shape.*\(7, 7\)"):
                load_published(system, **{given: on_meta({**whole, wrong: (7, 7)})})


def test_a_checkpoint_of_another_size_is_refused_with_its_tensors_named() -> None:
    with torch.device("meta"):
        system = VAR(preset_config("var-d16"))
    sides = tuple(h for h, _ in system.config.tokenizer.grids)
    with pytest.raises(WeightsError) as caught:
        load_published(system, generator=on_meta(published_transformer(20, sides)))
    message = str(caught.value)
    assert "unknown: blocks.16.attn" in message and "\n" not in message
    assert "wrong shape: pos_start (1, 1, 1280) instead of (1, 1, 1024)" in message


def test_refused_weights_leave_the_model_as_it_was() -> None:
    system = tiny_var()
    before = {n: p.clone() for n, p in system.state_dict().items()}
    with pytest.raises(WeightsError):
        load_published(system, generator={"head.weight": torch.zeros(32, 48), "head.bias": torch.zeros(31)})
    assert all(torch.equal(p, before[n]) for n, p in system.state_dict().items())


def test_published_constructor_arguments_become_a_configuration() -> None:
    config = published_config({"ch": 160, "share_quant_resi": 0, "quant_resi": -0.25, "v_patch_nums": [1, 2]},
                              {"depth": 3, "embed_dim": 96, "num_heads": 3, "patch_nums": [1, 2]})
    assert config.tokenizer.grids == ((1, 1), (2, 2)) and config.tokenizer.phi_ratio == 0.25
    assert not config.generator.l2_attention and config.tokenizer.autoencoder.latent_width == 32
    assert published_config({}, {}).tokenizer.autoencoder.width == 128
    for vae, var in (({"quant_conv_ks": 1}, {}), ({}, {"norm_eps": 1e-5}), ({"quant_resi": 0.0}, {}),
                     ({"v_patch_nums": [1, 2]}, {"patch_nums": [1, 3]})):
        with pytest.raises(InputError):
            published_config(vae, var)


def test_unknown_sizes_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="var-d16"):
        preset_config("var-d17")


def test_small_sizes_draw_and_have_the_same_weights_every_time() -> None:
    first, again = nextscale.load("var-d2-16px"), nextscale.load("var-d2-16px")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.generate(3, seed=1).images[0].size == (16, 16)
    with torch.device("meta"):
        assert VAR(preset_config("var-d6-64px")).tokenizer.picture_size == (64, 64)


def test_stochastic_depth_and_widths_follow_the_published_rule() -> None:
    config = preset_config("var-d24").generator
    assert (config.width, config.heads, round(config.drop_path, 9)) == (1536, 24, 0.1)
    assert preset_config("var-d36-s").generator.shared_modulation
    assert preset_config("var-d16").settings["fid"].guidance_scale == 2.5
    assert tuple(h for h, _ in GRIDS) == (1, 2, 3, 4)
