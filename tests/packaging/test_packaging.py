"""The package as it is installed: its metadata, its command, and its build with and without a compiler."""

import importlib.metadata
import importlib.resources
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import typing
import zipfile

import pytest
import torch

import grade_kernels as gk
from grade_kernels import _build, cli, doctor
from tests.support import ROOT
from tests.support.needs import needs, needs_backend


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def test_doctor_passes_here():
    done = python("-m", "grade_kernels.cli", "doctor", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("grade-kernels", "python", "torch", "triton", "Devices", *gk.backends.BACKENDS):
        assert name in done.stdout
    assert re.search(r"^  torch on cpu +ok \(", done.stdout, re.MULTILINE)
    assert "FAILED" not in done.stdout


def test_doctor_reports_a_wrong_backend(monkeypatch, capsys):
    monkeypatch.setattr(gk, "gumbel_sample", lambda logits, noise: gk.reference.gumbel_sample(logits))
    assert doctor.run() == 1
    assert "FAILED: gumbel_sample differs" in capsys.readouterr().out


def test_a_broken_record_of_the_build_stops_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "_PACKAGE", tmp_path)
    (tmp_path / "_build_info.json").write_text('{"torch": ')
    assert _build.build_info() == {}
    assert "was never compiled here" in _build.missing_reason()


def test_unknown_subcommand(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["dance"])
    assert raised.value.code == 2
    assert "'dance'" in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["many", "0", "1.5"])
def test_steps_of_the_demo_that_are_none(steps, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["demo", "--steps", steps])
    assert raised.value.code == 2
    assert f"argument --steps: must be a whole number of at least 1, got '{steps}'" in capsys.readouterr().err


def test_demo_without_its_packages_says_what_to_install(monkeypatch, capsys):
    demo = type(sys)("grade_kernels.demo")

    def run(arguments):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    demo.add_arguments, demo.run = lambda parser: None, run
    monkeypatch.setitem(sys.modules, "grade_kernels.demo", demo)
    assert cli.main(["demo"]) == 1
    assert "pip install 'grade-kernels[demo]'" in capsys.readouterr().err


def test_version_agrees_with_pyproject():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert importlib.metadata.version("grade-kernels") == gk.__version__ == declared
    assert declared in (ROOT / "CHANGELOG.md").read_text()


def test_typed():
    assert importlib.resources.files("grade_kernels").joinpath("py.typed").is_file()


@pytest.mark.parametrize("op", [gk.gumbel_ste_embedding, gk.linear_gumbel_ste])
def test_a_table_gives_a_tensor_and_a_tuple_a_tuple(op):
    """For type checkers, too: what is passed as `embedding` is the type of the result's."""
    hints = typing.get_type_hints(op)
    result = hints["return"]
    assert typing.get_args(result) == (hints["embedding"],)
    assert typing.get_type_hints(typing.get_origin(result))["embedding"] is hints["embedding"]
    assert hints["embedding"].__constraints__[:2] == (torch.Tensor, tuple[torch.Tensor, ...])


def test_import_is_light():
    """No device is queried, nothing optional is imported before it is needed, and then it is named."""
    done = python(
        "-c",
        "import sys, grade_kernels, grade_kernels.cli, torch\n"
        "heavy = {'transformers', 'triton', 'matplotlib', 'grade_kernels.demo', 'grade_kernels.doctor'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not torch.cuda.is_initialized()\n"
        "sys.modules['rich'] = None  # as if it were not installed\n"
        "try:\n"
        "    import grade_kernels.training\n"
        "except ModuleNotFoundError as error:\n"
        "    assert str(error).endswith(\"needs rich: pip install 'grade-kernels[train]'\"), error\n"
        "else:\n"
        "    raise AssertionError('imported without rich')",
    )
    assert done.returncode == 0, done.stderr


def test_build_records_what_it_did():
    info = _build.build_info()
    assert (_build.library_path() is None) == (info["reason"] is not None) == (_build.missing_reason() is not None)


@needs("a CUDA build of torch", torch.version.cuda is not None)
def test_a_cuda_build_of_torch_gets_the_cuda_kernels():
    """With the nvcc that fits it, and with or without a GPU. What was built in place is what `make` builds."""
    info, reason = _build.build_info(), _build.missing_cuda_reason()
    done = python("-m", "grade_kernels.cli", "doctor", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    if reason is not None:
        assert "nvcc was not found" in reason or "but nvcc is" in reason
        assert re.search(rf"^  cuda +not available: {re.escape(reason)}", done.stdout, re.MULTILINE)
        return
    assert info["cuda_compiler"].startswith(f"nvcc {torch.version.cuda.partition('.')[0]}.")
    assert f"built with {info['cuda_compiler']}" in done.stdout
    torch.ops.load_library(str(_build.cuda_library_path()))
    if torch.cuda.is_available():
        assert re.search(r"^  cuda +available", done.stdout, re.MULTILINE)
    else:
        assert re.search(r"^  cuda +not available: there is no NVIDIA GPU", done.stdout, re.MULTILINE)


def test_sdist_has_what_the_readme_links_to(tmp_path):
    """The guide whose examples the tests run, for one."""
    tree = tmp_path / "tree"
    unbuilt = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__", "*-output")
    shutil.copytree(ROOT, tree, ignore=unbuilt)
    arguments = ("setup.py", "-q", "sdist", "--dist-dir", str(tmp_path))
    subprocess.run([sys.executable, *arguments], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    linked = set(re.findall(r"\]\(([^):#]+)[)#]", (ROOT / "README.md").read_text()))
    assert "docs/training.md" in linked
    assert linked <= names, f"not in the sdist: {linked - names}"


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what the build reads, with nothing that was built."""
    unbuilt = shutil.ignore_patterns("*.so", "*.dylib", "_build_info.json", "__pycache__")
    for name in ("csrc", "grade_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unbuilt)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build_wheel(tree, **environment):
    arguments = (
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--verbose",
        "--wheel-dir",
        tree / "out",
        tree,
    )
    done = python(*arguments, **environment)
    wheels = list((tree / "out").glob("*.whl"))
    return done, wheels[0] if wheels else None


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_install_without_a_compiler_succeeds_with_a_warning(source_tree, compiler):
    done, wheel = build_wheel(source_tree, CXX=compiler, GRADE_KERNELS_REQUIRE_CSRC="0")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("WARNING: grade-kernels was installed WITHOUT its C++ backend") == 1
    with zipfile.ZipFile(wheel) as archive:
        assert compiler in json.loads(archive.read("grade_kernels/_build_info.json"))["reason"]
        assert not any(name.endswith((".so", ".dylib")) for name in archive.namelist())


def test_a_missing_compiler_can_be_made_an_error(source_tree):
    done, wheel = build_wheel(source_tree, CXX="false", GRADE_KERNELS_REQUIRE_CSRC="1")
    assert done.returncode != 0
    assert wheel is None


@needs_backend("cpu")
def test_compile_error_is_the_reason(source_tree):
    shutil.rmtree(source_tree / "csrc")
    (source_tree / "csrc" / "cpu").mkdir(parents=True)
    (source_tree / "csrc" / "cpu" / "broken.cpp").write_text("#error what is wrong with it\n")
    done, wheel = build_wheel(source_tree, GRADE_KERNELS_REQUIRE_CSRC="0")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(wheel) as archive:
        assert "what is wrong with it" in json.loads(archive.read("grade_kernels/_build_info.json"))["reason"]


@needs_backend("cpu")
def test_wheel_serves_every_python(source_tree):
    """A library of two small sources stands in for csrc, which takes longer to compile than it is worth here.

    They are of the same name, in different folders: both must be in the library.
    """
    for source in (source_tree / "csrc" / "cpu").rglob("*.cpp"):
        source.unlink()
    inner = source_tree / "csrc" / "cpu" / "inner"
    inner.mkdir()
    for folder, kind, name in ((inner.parent, "", "nothing"), (inner, "_FRAGMENT", "more")):
        (folder / "small.cpp").write_text(
            "#include <torch/csrc/stable/library.h>\n"
            f'STABLE_TORCH_LIBRARY{kind}(grade_kernels_packaging, m) {{ m.def("{name}(Tensor x) -> Tensor"); }}\n'
        )
    done, wheel = build_wheel(source_tree, GRADE_KERNELS_REQUIRE_CSRC="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {"grade_kernels/py.typed", "grade_kernels/_build_info.json"} <= set(names)
        library = next(name for name in names if name.startswith("grade_kernels/_C."))
        archive.extract(library, source_tree / "out")
    load = f"import torch; torch.ops.load_library({str(source_tree / 'out' / library)!r}); "
    both = "torch.ops.grade_kernels_packaging.nothing, torch.ops.grade_kernels_packaging.more"
    assert python("-c", load + both).returncode == 0
