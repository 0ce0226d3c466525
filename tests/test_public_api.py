"""Every public name: has it a docstring and annotated parameters?"""

import importlib
import inspect
import pkgutil

import pytest
import torch

import skdeq


def public_objects():
    """Public functions, classes, and the methods and properties that skdeq defines for them."""
    found = {"skdeq": skdeq}
    modules = [skdeq]
    for module in pkgutil.iter_modules(skdeq.__path__):
        if not module.name.startswith("_"):
            modules.append(importlib.import_module(f"skdeq.{module.name}"))
    for module in modules:
        found[module.__name__] = module
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing):
                continue
            found[f"{module.__name__}.{name}"] = thing
            if inspect.isclass(thing):
                found |= members(f"{module.__name__}.{name}", thing)
    return found


def members(path, cls):
    found = {}
    for base in cls.__mro__:
        if not base.__module__.startswith("skdeq"):
            continue
        for name, member in vars(base).items():
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            # A protocol gets an __init__ from the typing module.
            is_ours = isinstance(member, property) or (
                inspect.isfunction(member) and member.__module__.startswith("skdeq")
            )
            if is_ours and (name == "__init__" or not name.startswith("_")):
                found.setdefault(f"{path}.{name}", member)
    return found


OBJECTS = public_objects()


def is_generated(thing):
    # A dataclass writes its own __init__, with the annotations of its fields.
    return getattr(thing, "__name__", "") == "__init__"


@pytest.mark.parametrize("path", [path for path, one in OBJECTS.items() if not is_generated(one)])
def test_public_names_have_docstrings(path):
    documentation = inspect.getdoc(OBJECTS[path])
    assert documentation and documentation.splitlines()[0].rstrip().endswith("."), path
    assert "{{" not in documentation, path


@pytest.mark.parametrize(
    "path", [path for path, one in OBJECTS.items() if inspect.isfunction(one)]
)
def test_public_parameters_are_annotated(path):
    signature = inspect.signature(OBJECTS[path])
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not parameter.empty, f"{path}: {parameter.name}"
    assert signature.return_annotation is not signature.empty, path
    # Names of types, for help(), and not what numpy makes of them.
    assert "numpy._typing" not in str(signature), path


def test_the_walk_sees_what_it_should():
    expected = {
        "skdeq.ExpFamilyDEQ.fit",
        "skdeq.DEQClassifier.fit",
        "skdeq.families.Family.saturated",
        "skdeq.fixed_point.newton",
        "skdeq.nn.EquilibriumLayer.forward",
        "skdeq.objectives.BatchObjective.variance",
    }
    assert expected <= OBJECTS.keys()
    assert issubclass(OBJECTS["skdeq.nn.EquilibriumLayer"], torch.nn.Module)
