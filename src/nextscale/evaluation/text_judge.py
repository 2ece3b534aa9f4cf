"""Judges of whether a picture shows what a phrase says: a small contrastive model of our own, and published CLIPs.

A judge turns pictures and phrases into unit vectors of one space; their cosine is the agreement (CLIP, arXiv
2103.00020). What is measured with it is in text_agreement.py. ``open_text_judge`` knows, by text:

    emoji-text-judge   the one of the emoji set, where its weights are
    FOLDER             a judge that this library trained
    clip[:PLACE]       a CLIP through transformers; PLACE is a folder or a hub name
"""
from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale import hub
from nextscale.conditions.text_words import hashed_grams
from nextscale.configuration import build
from nextscale.errors import InputError, WeightsError, did_you_mean
from nextscale.evaluation.features import CLIP, fingerprint, pretrained, short_name
from nextscale.tokenizers.features import ClassifierConfig, PictureClassifier

LARGEST_SCALE = 100.0  # of the logits, as in CLIP
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_WORD = re.compile(r"\w+")


class PictureTextJudge(Protocol):
    """Pictures and phrases in one space.

    name: goes into every figure; fingerprint: of its weights.
    """

    name: str

    @property
    def fingerprint(self) -> str: ...

    def pictures(self, pictures: Tensor, batch: int = 64) -> Tensor:
        """Unit vectors (N, D) of pictures (N, 3, S, S') in [-1, 1], float32 on the CPU."""
        ...

    def phrases(self, phrases: Sequence[str], batch: int = 64) -> Tensor:
        """Unit vectors (M, D) of phrases, float32 on the CPU."""
        ...


@dataclass(frozen=True)
class TextJudgeConfig:
    """Size of a contrastive judge.

    size: side that pictures are resized to; patch, widths, blocks: of the picture tower's body, see
    :class:`~nextscale.tokenizers.features.ClassifierConfig`; cell_width: channels of the last map that are read cell by
    cell, beside the means of all maps; width: of the shared space; buckets, gram_width: rows and columns of the table
    of n-grams; grams: lengths of character n-grams, from and to; hidden: of the text tower's MLP; dropout: of the
    picture's features, in training.
    """

    size: int = 64
    patch: int = 4
    widths: tuple[int, ...] = (48, 96, 112)
    blocks: tuple[int, ...] = (0, 1, 0)
    cell_width: int = 20
    width: int = 96
    buckets: int = 3072
    gram_width: int = 44
    grams: tuple[int, int] = (3, 5)
    hidden: int = 96
    dropout: float = 0.2

    def __post_init__(self) -> None:
        self.body()
        for name in ("size", "cell_width", "width", "buckets", "gram_width", "hidden"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.size % self.factor:
            raise InputError(f"size is {self.size}; it must be a multiple of {self.factor}")
        if not 1 <= self.grams[0] <= self.grams[1]:
            raise InputError(f"grams are {self.grams}; give the shortest length, at least 1, and the longest")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it must be at least 0 and below 1")

    @property
    def factor(self) -> int:
        """Pixels a side of one cell of the last map."""
        return self.patch * 2 ** (len(self.widths) - 1)

    def body(self) -> ClassifierConfig:
        return ClassifierConfig(self.patch, self.widths, self.blocks)


def words_of(phrase: str) -> list[str]:
    """Words of a phrase: letters and digits, without case and in one form of Unicode; all else divides them."""
    return _WORD.findall(unicodedata.normalize("NFKC", phrase).casefold())


class Bags(NamedTuple):
    """The n-grams of M phrases in a row: rows of the table (G,), their weights (G,), where each phrase begins (M,)."""

    rows: Tensor
    weights: Tensor
    starts: Tensor


class TextJudge(nn.Module):
    """A small contrastive model of pictures and phrases.

    Pictures: means of the maps of a small residual network, and its last map cell by cell, projected. Phrases: the sum
    over words of the mean over a word's hashed n-grams, through a norm and an MLP; the order of words doesn't count.
    """

    def __init__(self, config: TextJudgeConfig, name: str = "text judge"):
        super().__init__()
        self.config, self.name = config, name
        self.body = PictureClassifier(config.body())
        self.body.heads = nn.ModuleList()
        cells = (config.size // config.factor) ** 2
        self.cells = nn.Conv2d(config.widths[-1], config.cell_width, 1)
        self.project = nn.Linear(sum(config.widths) + config.cell_width * cells, config.width)
        self.table = nn.Embedding(config.buckets, config.gram_width)
        self.text = nn.Sequential(nn.LayerNorm(config.gram_width), nn.Linear(config.gram_width, config.hidden),
                                  nn.GELU(), nn.Linear(config.hidden, config.width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @property
    def fingerprint(self) -> str:
        return fingerprint(self)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by in the loss: one over the learned temperature, at most 100."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def picture_vectors(self, picture: Tensor) -> Tensor:
        """Unit vectors (B, D) of pictures (B, 3, S, S') in [-1, 1]. Raises InputError for other shapes."""
        if picture.ndim != 4 or picture.shape[1] != 3:
            raise InputError(f"{self.name}: expected pictures (B, 3, S, S'), got {tuple(picture.shape)}")
        size = (self.config.size, self.config.size)
        if tuple(picture.shape[-2:]) != size:
            picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        maps = self.body.maps(picture)
        found_BF = torch.cat([*(one.mean((2, 3)).float() for one in maps), self.cells(maps[-1]).float().flatten(1)], 1)
        vectors: Tensor = self.project(F.dropout(found_BF, self.config.dropout, self.training))
        return F.normalize(vectors.float(), dim=1)

    def bags(self, phrases: Sequence[str]) -> Bags:
        """The n-grams of phrases."""
        rows: list[int] = []
        weights: list[float] = []
        starts: list[int] = []
        for phrase in phrases:
            starts.append(len(rows))
            for word in words_of(phrase):
                found = hashed_grams(word, self.config.buckets, *self.config.grams)
                rows += found
                weights += [1 / len(found)] * len(found)
        return Bags(torch.tensor(rows, dtype=torch.int64), torch.tensor(weights), torch.tensor(starts))

    def phrase_vectors(self, bags: Bags) -> Tensor:
        """Unit vectors (M, D) of phrases; one without any word has a vector too."""
        bags = Bags(*(one.to(self.device) for one in bags))
        summed_MG = F.embedding_bag(bags.rows, self.table.weight, bags.starts, mode="sum",
                                    per_sample_weights=bags.weights.to(self.table.weight))
        vectors: Tensor = self.text(summed_MG)
        return F.normalize(vectors.float(), dim=1)

    @torch.no_grad()
    def pictures(self, pictures: Tensor, batch: int = 64) -> Tensor:
        """See :class:`PictureTextJudge`."""
        self.eval()
        return torch.cat([self.picture_vectors(part.to(self.device).float()).cpu() for part in pictures.split(batch)])

    @torch.no_grad()
    def phrases(self, phrases: Sequence[str], batch: int = 1024) -> Tensor:
        """See :class:`PictureTextJudge`."""
        self.eval()
        return torch.cat([self.phrase_vectors(self.bags(phrases[start:start + batch])).cpu()
                          for start in range(0, len(phrases), batch)])


def contrastive_loss(pictures_ND: Tensor, phrases_MD: Tensor, fits_NM: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric cross-entropy of matching pictures to phrases and phrases to pictures (InfoNCE; CLIP, figure 3).

    L = (CE(softmax_m(s p_n . t_m), y_nm) + CE(softmax_n(s p_n . t_m), y_nm)) / 2, where y shares the probability
    evenly among all that fit, since several pictures of a batch may fit one phrase (UniCL, arXiv 2204.03610). Phrases
    that fit no picture are wrong answers for the pictures and ask nothing of their own.

    pictures_ND, phrases_MD: unit vectors; fits_NM: bool; scale: s. Raises InputError where a picture has no phrase.
    """
    if fits_NM.shape != (len(pictures_ND), len(phrases_MD)):
        raise InputError(f"fits are {tuple(fits_NM.shape)}, not {(len(pictures_ND), len(phrases_MD))}")
    if not fits_NM.any(1).all():
        raise InputError("a picture fits none of the phrases; give each its own")
    logits_NM, fits_NM = scale * pictures_ND @ phrases_MD.T, fits_NM.to(pictures_ND)
    count_N, count_M = fits_NM.sum(1), fits_NM.sum(0)
    of_pictures_N = (logits_NM.log_softmax(1) * fits_NM).sum(1) / count_N
    of_phrases_M = (logits_NM.log_softmax(0) * fits_NM).sum(0) / count_M.clamp_min(1)
    return -(of_pictures_N.mean() + of_phrases_M.sum() / (count_M > 0).sum()) / 2


def save_text_judge(judge: TextJudge, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``config.json`` and ``judge.safetensors`` into a folder."""
    tensors = {name: tensor.to(dtype) for name, tensor in judge.state_dict().items()}
    hub.save_tensors(tensors, folder / "judge.safetensors", {"part": "text judge"})
    hub.save_json(asdict(judge.config), folder / "config.json")


def load_text_judge(where: str | Path) -> TextJudge:
    """A judge by the name it ships under or from a folder, in evaluation mode.

    Raises WeightsError where it is missing, damaged or doesn't fit its configuration.
    """
    folder = Path(where)
    if not folder.is_dir():
        folder = Path(str(files("nextscale").joinpath("weights"))) / where
    if not folder.is_dir():
        raise WeightsError(f"no text judge at {where}; give a folder that holds config.json and judge.safetensors")
    config = build(TextJudgeConfig, hub.read_json(folder / "config.json"), str(folder / "config.json"))
    judge, path = TextJudge(config, folder.name), folder / "judge.safetensors"
    tensors = {name: tensor.float() for name, tensor in hub.read_tensors(path).items()}
    hub.load_published(judge, tensors, ((r"(.*)", r"\1"),), str(path))
    return judge.eval()


class CLIPJudge:
    """A CLIP through transformers: projected embeddings, normalised, at the size that it was trained with.

    Pictures are resized whole (bicubic, antialiased), never cropped, so those of other proportions are squeezed.
    """

    def __init__(self, network: Any, tokenizer: Any, name: str):
        self.network, self.tokenizer, self.name = network.eval(), tokenizer, name
        self.size = int(network.config.vision_config.image_size)
        self.longest = int(network.config.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        place: torch.device = next(self.network.parameters()).device
        return place

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.network)

    @torch.no_grad()
    def pictures(self, pictures: Tensor, batch: int = 64) -> Tensor:
        """See :class:`PictureTextJudge`."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise InputError(f"{self.name}: expected pictures (N, 3, S, S'), got {tuple(pictures.shape)}")
        found, shape = [], (1, 3, 1, 1)
        for part in pictures.split(batch):
            x = part.to(self.device).float()
            x = F.interpolate(x, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
            x = ((x + 1) / 2 - x.new_tensor(_CLIP_MEAN).view(shape)) / x.new_tensor(_CLIP_STD).view(shape)
            out = self.network.vision_model(pixel_values=x).pooler_output
            found.append(F.normalize(self.network.visual_projection(out).float(), dim=1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def phrases(self, phrases: Sequence[str], batch: int = 64) -> Tensor:
        """See :class:`PictureTextJudge`; phrases of more tokens than it knows are cut."""
        found = []
        for start in range(0, len(phrases), batch):
            tokens = self.tokenizer(list(phrases[start:start + batch]), padding=True, truncation=True,
                                    max_length=self.longest, return_tensors="pt").to(self.device)
            out = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            found.append(F.normalize(self.network.text_projection(out.pooler_output).float(), dim=1).cpu())
        return torch.cat(found)


def load_clip(place: str = CLIP) -> CLIPJudge:
    """A CLIP from a folder or by its hub name.

    Raises:
        MissingExtraError: transformers is not installed.
        WeightsError: missing, damaged, or no CLIP.
    """
    network = pretrained("CLIPModel", place)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # the hub and the loader have dozens of error types
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{place} has no tokenizer that can be loaded ({reason})") from None
    return CLIPJudge(network, tokenizer, f"clip ({short_name(place)})")


def open_text_judge(spec: str) -> PictureTextJudge:
    """A judge by text, see this file's head.

    Raises:
        InputError: unknown name.
        WeightsError: weights missing, damaged or of another network.
        MissingExtraError: transformers is not installed.
    """
    name, _, place = spec.partition(":")
    if name == "clip":
        return load_clip(place or CLIP)
    if Path(spec).is_dir() or spec == "emoji-text-judge":
        return load_text_judge(spec)
    known = ("emoji-text-judge", "clip")
    hint = did_you_mean(spec, known, f"; use {', '.join(known)}, a judge's folder")
    raise InputError(f"unknown text judge {spec!r}{hint}")
