"""systems.toml is complete and honest, and names lead to code or to the nearest name."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from nextscale import registry
from nextscale.errors import DataError, InputError

CHECKOUT = Path(__file__).resolve().parents[1]
TABLE = registry._table()
NOT_PLANNED = sorted(slug for slug, entry in TABLE.items() if entry.status != "planned")


def test_table_has_every_system_once() -> None:
    assert len(TABLE) == 130
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", slug) for slug in TABLE)
    assert len({entry.title for entry in TABLE.values()}) == 130


def test_rows_use_known_statuses_and_families() -> None:
    assert {entry.status for entry in TABLE.values()} <= set(registry.STATUSES)
    assert {entry.family for entry in TABLE.values()} == set(registry.FAMILIES[:-1])
    for entry in TABLE.values():
        assert entry.name and entry.title
        assert re.fullmatch(r"(\d{4}\.\d{4,5})?", entry.paper), entry.slug


def test_planned_rows_claim_nothing() -> None:
    for entry in TABLE.values():
        if entry.status == "planned":
            assert (entry.where, entry.command, entry.check, entry.licence) == ("", "", "", ""), entry.slug


@pytest.mark.parametrize("slug", NOT_PLANNED)
def test_what_is_built_imports_and_names_its_command_and_check(slug: str) -> None:
    entry = TABLE[slug]
    assert registry.resolve(slug) is registry.import_target(entry.where)
    assert entry.command.startswith("nextscale ")
    assert entry.check
    assert entry.licence and entry.authors
    for word in shlex.split(entry.check):
        path = word.partition("::")[0]
        if "/" in path:
            assert (CHECKOUT / path).is_file(), f"{slug}: its check names {path}, which is not there"


def test_citation_has_what_is_known_and_only_that() -> None:
    assert TABLE["var"].citation() == (
        "@misc{var,\n"
        "  title = {{Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction}},\n"
        "  author = {Tian, Keyu and others},\n  year = {2024},\n  eprint = {2404.02905},\n"
        "  archivePrefix = {arXiv},\n}"
    )
    assert "author" not in TABLE["vlae"].citation() and "year = {2016}" in TABLE["vlae"].citation()
    assert TABLE["pixelbytes"].citation() == ""


def test_table_names_no_place_on_a_machine() -> None:
    text = registry.systems_path().read_text(encoding="utf-8")
    assert not re.search(r"[\s\"'=](?:~?/\w|\.\./|[A-Z]:\\)", text)


@pytest.mark.parametrize("model", sorted(registry.models()))
def test_every_model_name_leads_to_a_function(model: str) -> None:
    assert callable(registry.resolve(model))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("fast-var", "fastvar"), ("Infinty", "infinity"), ("var-d61", "var-d16"), ("emojitext64", "emoji-text-64")],
)
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{meant}'"):
        registry.resolve(typed)


def test_unknown_name_with_nothing_near_says_where_names_are_listed() -> None:
    with pytest.raises(InputError, match="`nextscale systems`"):
        registry.resolve("qqqqzzzz")


def test_published_name_is_understood_and_a_shared_one_asks_for_a_slug() -> None:
    assert registry.system_entry("LlamaGen").slug == "llamagen"
    with pytest.raises(InputError, match="par, panorama_ar"):
        registry.system_entry("PAR")


def test_planned_system_says_so() -> None:
    slug = next(slug for slug, entry in TABLE.items() if entry.status == "planned")
    with pytest.raises(InputError, match="planned"):
        registry.resolve(slug)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nextscale.errors", "module:name"),
        ("nextscale.nowhere:Thing", "no module"),
        ("nextscale.errors:InputEror", "did you mean 'InputError'"),
    ],
)
def test_bad_target_is_one_clear_line(target: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        registry.import_target(target)
    assert "\n" not in str(caught.value)


def test_broken_import_inside_a_module_is_not_reported_as_an_unknown_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_absent_package.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        registry.import_target("needs_absent_package:anything")


def test_other_packages_add_systems_and_models_but_cannot_take_names(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("theirs", "nextscale.errors:InputError", "nextscale.systems"),
            EntryPoint("theirs-small", "nextscale.errors:nearest", "nextscale.models"),
            EntryPoint("var-d16", "nextscale.errors:nearest", "nextscale.models"),
        ]
    )
    monkeypatch.setattr(registry, "_installed", lambda path: points)
    assert registry.systems()["theirs"].family == registry.FAMILIES[-1]
    with pytest.warns(UserWarning, match="var-d16"):
        assert registry.resolve("theirs") is InputError
        table = registry.models()
    assert table["theirs-small"] == "nextscale.errors:nearest"
    assert table["var-d16"] != "nextscale.errors:nearest"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not toml [", "not valid TOML"),
        ("var = 3\n", "must be a table"),
        ("[var]\nname = 'VAR'\n", "lacks"),
        ("[var]\n" + "\n".join(f"{c} = 3" for c in registry.COLUMNS), "must be a string"),
        ("[var]\n" + "\n".join(f"{c} = ''" for c in (*registry.COLUMNS, "colour")), "colour"),
    ],
)
def test_damaged_table_is_one_clear_line(
    row: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "systems.toml"
    path.write_text(row)
    monkeypatch.setattr(registry, "systems_path", lambda: path)
    with pytest.raises(DataError, match=message):
        registry._table.__wrapped__()


@pytest.mark.parametrize("name", ["var-d2-16px", "flowar-64px", "mar-64px"])
def test_listed_sizes_are_those_of_the_whole_model(name: str) -> None:
    """The list builds systems with a narrow tokenizer and counts the real one once for all that share it."""
    import torch

    from nextscale.cli.models import _millions
    from nextscale.systems.folders import build_system, model_config

    config = model_config(name)
    assert config is not None
    with torch.device("meta"):
        system = build_system(config)
    tokenizer = sum(p.numel() for p in system.tokenizer.parameters())
    rest = sum(p.numel() for p in system.parameters()) - tokenizer
    assert _millions(config) == f"{rest / 1e6:,.0f}M + {tokenizer / 1e6:,.0f}M tokenizer"


def test_the_column_of_weights_says_what_was_released(capsys: pytest.CaptureFixture[str]) -> None:
    """CAR's authors released towers for d16 alone, SCALAR's none; VAR's files, their base, begin at d16."""
    from nextscale.cli.main import run
    from nextscale.registry import models, weights_of

    named = {name: weights_of(name) for name in models() if name.startswith(("car-", "scalar-"))}
    assert named == {"car-d12": "none", "car-d16": "published", "car-d20": "base", "car-d24": "base", "car-d30": "base",
                     "scalar-d12": "none", "scalar-d16": "base", "scalar-d20": "base", "scalar-d24": "base"}
    assert all(weights_of(f"var-{name.split('-')[1]}") == "published"
               for name, kind in named.items() if kind != "none")
    assert run(["models"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, kind in named.items():
        told = {"none": "none: for training", "published": "published files: --weights",
                "base": "published files of the base; none of the control"}[kind]
        assert told in listed[name]
