"""What importing nextscale costs and which files may know which names."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import nextscale
from nextscale.registry import systems

PACKAGE = Path(nextscale.__file__).parent

# What only some commands need: the core must start without it and without paying for it.
HEAVY = (
    "datasets", "fastapi", "lpips", "matplotlib", "pandas", "peft", "pyarrow", "resvg_py", "rich", "scipy",
    "tensorboard", "torch.utils.tensorboard", "torch_fidelity", "torchmetrics", "torchvision", "transformers",
    "typer", "uvicorn", "webdataset",
)  # fmt: skip

# Slugs that are also ordinary words of tensor code: `scalar`, `axial` and the like say nothing about a system.
ORDINARY = {"axial", "scalar", "dart", "star", "ear", "toto"}


def test_import_loads_no_optional_package() -> None:
    code = f"import sys, nextscale; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_works_where_optional_packages_are_absent() -> None:
    blocked = {name.partition(".")[0] for name in HEAVY if not name.startswith("torch.")}
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)!r})); import nextscale"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def systems_named(source: str, slugs: set[str]) -> list[tuple[str, int]]:
    """Slugs that stand in an identifier as whole words, with their lines.

    Slugs of up to three letters count only as a whole identifier that is no attribute: `x_var` and `x.var()` are
    variances.
    """
    named = []
    before = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", token.string).lower()
            for slug in slugs:
                short = len(slug) <= 3
                if (words == slug and not (short and before == ".")) or (not short and f"_{slug}_" in f"_{words}_"):
                    named.append((slug, token.start[0]))
        before = token.string
    return named


def test_rule_finds_system_names_and_spares_ordinary_words() -> None:
    slugs = set(systems()) - ORDINARY
    assert systems_named("def fastvar_rows(x): ...", slugs) == [("fastvar", 1)]
    assert systems_named("class InfinityBlock: ...", slugs) == [("infinity", 1)]
    assert systems_named("if kind == xar: ...", slugs) == [("xar", 1)]
    assert systems_named("x_var, mean = torch.var_mean(x), x.var()  # as VAR does\nscalar = 'fastvar'", slugs) == []


def test_layers_name_no_system() -> None:
    slugs = set(systems()) - ORDINARY
    files = sorted((PACKAGE / "layers").rglob("*.py"))
    assert files
    for path in files:
        named = systems_named(path.read_text(encoding="utf-8"), slugs)
        assert not named, f"{path.relative_to(PACKAGE)} names systems (slug, line): {named}"


def test_the_table_of_names_imports_no_system() -> None:
    code = "import sys, nextscale.registry; print([m for m in sys.modules if m.startswith('nextscale.systems')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_folder_with_code_is_a_package_that_the_direction_check_sees() -> None:
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    bare = sorted(str(folder.relative_to(PACKAGE)) for folder in folders if not (folder / "__init__.py").is_file())
    assert not bare, f"folders without __init__.py: {bare}"
