"""The rooms: which way imports go, how long functions are, what a command line needs, who may end the program."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import cli

ROOMS = ("models", "datasets", "utils")
SCRIPTS = ("train.py", "test.py", "reconstruct.py")
MAY_IMPORT = {"scripts": {"models", "datasets", "utils"}, "models": {"models", "datasets", "utils"},
              "datasets": {"datasets", "utils"}, "utils": {"utils"}}
PARSERS = ("train", "test", "reconstruct", "datasets.prepare", "datasets.look", "datasets.preprocess_aapm",
           "datasets.rebin", "models.convert", "fig.plot_run", "fig.quantitative", "fig.framework", "fig.tables",
           "benchmarks.ablation", "benchmarks.robustness", "benchmarks.bench_sampling", "benchmarks.bench_projector",
           "benchmarks.bench_train", "benchmarks.bench_prepare", "benchmarks.bench_rebin", "benchmarks.compare",
           "benchmarks.gpu", "benchmarks.scanners")


def sources() -> dict[str, ast.Module]:
    """{dotted name: tree} of the rooms and the scripts."""
    files = [ROOT / name for name in SCRIPTS] + [path for room in ROOMS for path in (ROOT / room).glob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
            for path in files}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of our modules that a tree imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    return {name for name in found
            if name.split(".")[0] in ROOMS and (ROOT / (name.replace(".", "/") + ".py")).is_file()}


def test_imports_go_one_way():
    for name, tree in sources().items():
        room = name.split(".")[0] if "." in name else "scripts"
        wrong = {other for other in imports(tree) if other.split(".")[0] not in MAY_IMPORT[room]}
        assert not wrong, f"{name} imports {wrong}"


def test_no_module_imports_itself_through_others():
    arrows = {name: imports(tree) for name, tree in sources().items()}
    reached = dict(arrows)
    for _ in arrows:
        reached = {name: found | {far for near in found for far in reached.get(near, ())}
                   for name, found in reached.items()}
    assert not [name for name, found in reached.items() if name in found]


def test_libraries_raise_and_scripts_exit():
    for name, tree in sources().items():
        called = {node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call)
                  and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "sys"}
        at_the_end = [node for node in tree.body if isinstance(node, ast.If)]  # if __name__ == "__main__"
        ends = {node.func.attr for part in at_the_end for node in ast.walk(part) if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "sys"}
        assert "exit" not in called - ends or name == "utils.cli", name


def test_no_function_is_long_but_lists_of_flags():
    for name, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "arguments":
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name}"


def test_the_training_loop_can_be_read_at_once():
    main = next(node for node in ast.parse((ROOT / "train.py").read_text()).body if getattr(node, "name", "") == "main")

    def depth(node):
        inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, ast.For | ast.While | ast.If | ast.With | ast.Try)

    assert main.end_lineno - main.lineno < 60 and depth(main) <= 3


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_says_what_it_does_and_what_it_is_without_it(name, monkeypatch):
    parsers = []
    monkeypatch.setattr(cli.Parser, "parse_args", lambda parser, argv=None: parsers.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([])
    (parser,) = parsers
    for action in parser._actions[1:]:
        text = parser._get_formatter()._get_help_string(action) or ""
        assert len(text) > 8, action.dest
        switch = action.nargs == 0 and action.default is False
        assert "default" in text or action.required or switch, action.dest


@pytest.mark.parametrize("name", ["train", "test", "reconstruct", "models.convert", "datasets.prepare",
                                  "datasets.look"])
@pytest.mark.parametrize("argv", [["--help"], ["--nonsense"], ["--data", "nowhere", "--out", "nowhere/out"],
                                  ["nowhere", "--out", "nowhere/out"], ["nowhere", "nowhere.safetensors"]])
def test_an_answer_about_the_command_line_does_not_wait_for_pytorch(name, argv):
    """The wrong path among these: for each script one of the last three."""
    program = f"import sys, {name} as script\ntry: script.main({argv})\nexcept SystemExit: pass\n" \
              "sys.exit(bool({'torch', 'scipy', 'matplotlib', 'numba'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout if argv == ["--help"] else done.stderr
    assert said and "Traceback" not in said
    if argv != ["--help"]:
        assert len(said.strip().splitlines()) == 1, "one sentence, not pages of flags"


def test_the_lock_file_has_every_requirement_and_a_hash_of_every_package():
    def pins(text):
        found = re.findall(r"^([\w.-]+)==(\S+)", text, re.M)
        return {(name.replace("_", "-").lower(), version) for name, version in found}

    wanted, lock = ((ROOT / f"requirements.{end}").read_text(encoding="utf-8") for end in ("txt", "lock"))
    lines = [line for line in wanted.splitlines() if line != "./torch-radon_fix"]
    assert len(pins(wanted)) == len(lines) and pins(wanted) <= pins(lock)
    hashes = r"( *\\\n    --hash=sha256:[0-9a-f]{64})+"
    rest = re.sub(rf"^[a-z0-9.-]+==[0-9][\w.]*( ;[^\\\n]*)?{hashes}\n", "", lock, flags=re.M)
    assert all(line.startswith("#") for line in rest.splitlines()), rest  # and no version of a local build
