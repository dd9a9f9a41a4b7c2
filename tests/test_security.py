"""Nothing is executed, unpickled or fetched: not by a hostile checkpoint, and not at any time."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kd_balance
from tests.habits import Lab, assert_one_sentence, plain

ALL = Path(kd_balance.__file__).parent.rglob("*.py")


class Hostile:
    """Runs a command when it is unpickled, and tells of whatever is asked of it."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)

    def __getattr__(self, name):
        if name == "victim" or name.startswith("__"):
            raise AttributeError(name)
        os.mkdir(self.victim)


def within_a_window():
    lab = Lab()
    lab.wrap(rate=0.1, unroll=4, every=4)
    plain(2)(lab)
    return lab


def test_a_checkpoint_is_read_as_data_and_a_hostile_one_is_not_read(tmp_path):
    state = within_a_window().optimizer.state_dict()
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    within_a_window().optimizer.load_state_dict(loaded)
    state["kd_balance"]["window"].append(Hostile(tmp_path / "victim"))
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="[Uu]nsupported|weights_only"):
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert not (tmp_path / "victim").exists()


HOSTILE = {
    "a function": ["os.mkdir", "{victim}"],
    "a builtin": ["eval", "__import__('os').mkdir('{victim}')"],
    "one of torch's names": ["dtype", "load"],
    "an object by its name": ["live", "__builtins__"],
    "an optimizer that is none": ["optimizer", "os.mkdir"],
    "a class with other arguments": ["InnerStep", "os.mkdir", "{victim}"],
    "a device": ["device", "{victim}", ["os.mkdir"]],
    "a dict of pairs": ["dict", ["os.mkdir", "{victim}"]],
    "a random state": ["RandomState", {"torch": "{victim}"}, None],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_window_names_is_looked_up_among_a_few_kinds(name, tmp_path):
    def filled(value):
        if isinstance(value, (list, dict)):
            items = value.items() if isinstance(value, dict) else value
            return type(value)(map(filled, items))
        if isinstance(value, tuple):
            return tuple(map(filled, value))
        return value.format(victim=tmp_path / "victim") if isinstance(value, str) else value

    optimizer = within_a_window().optimizer
    state = optimizer.state_dict()
    state["kd_balance"]["window"][2] = filled(HOSTILE[name])
    with pytest.raises(ValueError, match="open window cannot be read") as error:
        optimizer.load_state_dict(state)
    assert_one_sentence(error)
    assert not (tmp_path / "victim").exists()


FORBIDDEN = {
    "pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess",
    "socket", "ssl", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib",
    "huggingface_hub", "webbrowser",
}


def test_the_package_names_nothing_that_executes_unpickles_or_fetches():
    for path in ALL:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not {name.partition(".")[0] for name in modules} & FORBIDDEN, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "__import__", "os.system"}, path
                assert called not in {"torch.load", "np.load", "torch.hub.load"}, path


TRAINS = """
import sys

def forbid(event, args):
    if event.startswith(("socket.", "urllib.", "ftplib.", "http.", "smtplib.", "webbrowser.")):
        raise SystemExit(f"{event} {args}")
    if started and event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
                             "os.fork", "pickle.find_class", "exec", "compile"):
        raise SystemExit(f"{event} {args}")

started = False
sys.addaudithook(forbid)
import torch
from torch import nn
import kd_balance
from kd_balance import BilevelOptimizer, WeightedKDLoss

student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
inputs, labels = torch.randn(60, 4), torch.arange(60) % 3

def train():
    criterion = WeightedKDLoss.long_tailed([20, 20, 20])
    optimizer = BilevelOptimizer(
        torch.optim.AdamW(student.parameters()), student, criterion, [(inputs, labels)],
        teacher=teacher, unroll=2, every=2,
    )
    for _ in range(5):
        optimizer.zero_grad()
        criterion(student(inputs), teacher(inputs).detach(), labels).backward()
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.metrics["meta_updates"] == 2

train()  # whatever torch itself makes when something is called first
started = True
train()
started = False
print("trained")
"""


def test_importing_and_training_open_no_socket_and_run_no_program():
    quiet = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, env=quiet
    )
    assert done.stdout == "trained\n", done.stderr
