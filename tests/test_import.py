"""What `import skdeq` loads, and what it makes available."""

import ast
import configparser
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import skdeq

PACKAGE = Path(skdeq.__file__).parent
# Each takes a tenth of a second or more (torch's compiler as long as all of torch), and no
# public name needs one before it is used.
HEAVY = [
    "matplotlib",
    "pandas",
    "polars",
    "scipy.optimize",
    "scipy.stats",
    "skdeq.nn",
    "sklearn.decomposition",
    "sklearn.linear_model",
    "torch._dynamo",
    "torch._inductor",
]

LOADED = """
import sys
import {modules}
print(*sys.modules, sep="\\n")
"""


def loaded_by(modules):
    command = [sys.executable, "-c", LOADED.format(modules=modules)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_loads_no_heavy_modules():
    by_skdeq = loaded_by("skdeq")
    by_dependencies = loaded_by("torch, sklearn")
    assert {"skdeq", "torch", "sklearn"} <= by_skdeq
    assert not (by_skdeq - by_dependencies) & set(HEAVY)


def test_the_oldest_versions_are_the_lower_bounds():
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    oldest = (PACKAGE.parent / "constraints-oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in oldest if "==" in line)
    assert required
    for bound in required:
        name, version = bound.split(">=")
        assert pinned[name].removesuffix(".0").startswith(version)


ALONE = """
import sys, types
skdeq = types.ModuleType("skdeq")
skdeq.__path__ = [{path!r}]
sys.modules["skdeq"] = skdeq
import skdeq.{module}
print(*sys.modules, sep="\\n")
"""


@pytest.mark.parametrize("module", ["families", "fixed_point", "implicit", "nn", "objectives"])
def test_the_mathematics_is_on_torch_alone(module):
    # Of the package only what the module itself imports.
    script = ALONE.format(path=str(PACKAGE), module=module)
    command = [sys.executable, "-c", script]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert f"skdeq.{module}" in loaded
    assert not {"scipy", "sklearn", "joblib", "pandas"} & {
        name.partition(".")[0] for name in loaded
    }


FITTED = """
import sys
import numpy as np
from skdeq import ExpFamilyDEQ, ImplicitEMEncoder
before = set(sys.modules)
X = np.random.default_rng(0).poisson(2.0, size=(60, 8)).astype(float)
for model in (ExpFamilyDEQ(2, family="poisson"), ImplicitEMEncoder(4)):
    model.fit(X).transform(X)
print(*set(sys.modules) - before, sep="\\n")
"""


def test_the_first_fit_of_a_process_loads_nothing_heavy():
    command = [sys.executable, "-W", "ignore", "-c", FITTED]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    packages = {name.partition(".")[0] for name in loaded}
    assert not packages & {"sympy", "matplotlib", "pandas"}
    assert not {*loaded} & {"torch._dynamo", "torch._inductor", "skdeq.nn"}


def test_submodules_are_there_when_asked_for():
    public = {module.name for module in pkgutil.iter_modules(skdeq.__path__)}
    public = {name for name in public if not name.startswith("_")}
    assert public <= set(skdeq.__all__) <= set(dir(skdeq))
    script = "; ".join(
        ["import skdeq", *(f"assert skdeq.{name}.__name__ == 'skdeq.{name}'" for name in public)]
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="module 'skdeq' has no attribute 'pca'"):
        skdeq.pca  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'pca' from 'skdeq'"):
        from skdeq import pca  # noqa: F401


def test_star_import_gives_the_public_names():
    names = {}
    exec("from skdeq import *", names)
    assert set(skdeq.__all__) <= names.keys()


def test_private_modules_say_what_others_use_of_them():
    modules = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}
    for user, tree in modules.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            of_package = node.level or node.module.startswith("skdeq.")
            name = node.module.rpartition(".")[2]
            if not of_package or name not in modules.keys() - {"_version"} or name[0] != "_":
                continue
            public = importlib.import_module(f"skdeq.{name}").__all__
            missing = {one.name for one in node.names if one.name[0] != "_"} - {*public}
            assert not missing, f"{user} has {missing} from {name}"
