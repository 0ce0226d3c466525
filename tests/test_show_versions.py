"""The list of versions for reports of problems."""

from importlib.metadata import version

import torch

import skdeq


def entries(text):
    """The lines ``name: value`` of a report; of the same name the first."""
    found = {}
    for line in text.splitlines():
        name, colon, value = line.partition(": ")
        if colon:
            found.setdefault(name.strip(), value)
    return found


def test_names_every_dependency_cores_and_devices(capsys):
    skdeq.show_versions()
    report = entries(capsys.readouterr().out)
    assert report["skdeq"] == skdeq.__version__
    assert report["sklearn"] == version("scikit-learn")
    for name in ("numpy", "scipy", "joblib"):
        assert report[name] == version(name)
    assert report["torch"] == torch.__version__
    assert {"python", "machine", "pandas", "matplotlib", "rich", "skops"} <= report.keys()
    assert report["torch threads"] == str(torch.get_num_threads())
    # The BLAS and OpenMP libraries in use.
    assert "num_threads" in report


def test_names_the_cuda_devices(capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    skdeq.show_versions()
    assert entries(capsys.readouterr().out)["CUDA"] == "12.6, cuda:0 Card 0, cuda:1 Card 1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    skdeq.show_versions()
    assert entries(capsys.readouterr().out)["CUDA"] == "12.6, no device available"


def test_packages_that_are_not_installed_are_none(capsys, monkeypatch):
    monkeypatch.setattr("skdeq._show_versions._OPTIONAL", ("no-such-package-of-ours",))
    skdeq.show_versions()
    assert entries(capsys.readouterr().out)["no-such-package-of-ours"] == "None"
